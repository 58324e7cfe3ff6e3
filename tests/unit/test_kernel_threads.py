"""The threads of the kernels wait for each other at their meetings, and notice that others use their cores."""

import os
import subprocess
from pathlib import Path

import pytest

from ee_tuning.kernel import build

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="no C++ compiler")

PROGRAM = """
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>
#include "meeting.h"

int early() {  // threads that went on before all had arrived
    std::atomic<int> arrived{0}, wrong{0};
    Meeting meeting;
    #pragma omp parallel num_threads(4)
    for (int round = 1; round <= 60; ++round) {
        arrived.fetch_add(1);
        meeting.wait();
        if (arrived.load() < 4 * round) wrong.fetch_add(1);
        meeting.wait();
    }
    return wrong.load();
}

int sees_contention() {
    std::atomic<int> seen{0};
    std::vector<std::thread> threads;
    const auto until = Contention::Clock::now() + std::chrono::seconds(20);
    for (int i = 0; i < 4; ++i)
        threads.emplace_back([&] {
            for (auto now = until; !seen.load() && (now = Contention::Clock::now()) < until;)
                if (Contention::is_seen(now)) seen.store(1);
        });
    for (auto &thread : threads) thread.join();
    return seen.load();
}

int main(int, char **argv) { std::printf("%d", std::strcmp(argv[1], "early") ? sees_contention() : early()); }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("threads")
    (folder / "threads.cpp").write_text(PROGRAM)
    headers, compiler = Path(build.__file__).parent, build._compiler()
    flags = ["-std=c++17", "-O2", "-pthread", "-fopenmp", f"-I{headers}"]
    assert compiler is not None
    subprocess.run([compiler, *flags, folder / "threads.cpp", "-o", folder / "threads"], check=True)
    return folder / "threads"


def run_on_one_core(program: Path, what: str) -> int:
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})  # this thread's, which the program inherits
    try:
        return int(subprocess.run([program, what], check=True, capture_output=True, text=True, timeout=60).stdout)
    finally:
        os.sched_setaffinity(0, own)


def test_nobody_goes_on_before_all_have_arrived(program: Path) -> None:
    """A wake-up that is lost, or a thread that passes two meetings at once: here most waits end in sleep."""
    assert run_on_one_core(program, "early") == 0


@pytest.mark.skipif(not Path("/proc/thread-self/schedstat").exists(), reason="Linux counts no waits for cores")
def test_threads_on_one_core_see_that_they_wait_for_it(program: Path) -> None:
    """A count of the whole machine, on which other cores are idle."""
    assert run_on_one_core(program, "contention") == 1
