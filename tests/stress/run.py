"""`make stress`: the full counts, and the record of them in docs/stress.md. Takes most of an hour on two cores.

python tests/stress/run.py --output docs/stress.md
"""

import argparse
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Protocol

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

COUNTS = {
    "safetensors": 3000,
    "checkpoints": 500,
    "saves": 100,
    "tuning": 100,
    "mixtures": 1000,
    "stages": 200,
    "speculation": 200,
    "growth": 10_000,
    "calibrations": 1000,
    "requests": 1000,
    "connections": 10_000,
    "load": 600,
}


def main() -> int:
    """Runs it all; the exit code is 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Markdown file for the record")
    parser.add_argument(
        "--only", choices=list(COUNTS), nargs="+", default=list(COUNTS), help="the other parts of the record stay"
    )
    parser.add_argument("--seed", type=int, default=1)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N")
    options = vars(parser.parse_args())

    import torch
    from calibration_stress import stress_calibrations
    from checkpoint_stress import stress_checkpoints
    from decoding_stress import stress_growth, stress_mixtures, stress_speculation
    from kills import stress_saves, stress_tuning
    from nursery import Nursery
    from safetensors_stress import stress_safetensors
    from serving_stress import stress_connections, stress_load, stress_requests
    from stages_stress import stress_stages

    torch.set_num_threads(1)
    nursery, seed = Nursery(), options["seed"]
    damaged, killed = "mutations", "kills"
    stories = [
        _Part(
            "Damaged safetensors",
            options["safetensors"],
            damaged,
            lambda n, folder: stress_safetensors(n, seed, folder),
        ),
        _Part(
            "Damaged Megatron checkpoints",
            options["checkpoints"],
            damaged,
            lambda n, folder: stress_checkpoints(n, seed, folder),
        ),
        _Part(
            "`kill -9` while a command saves",
            options["saves"],
            killed,
            lambda n, folder: stress_saves(n, seed, folder, nursery),
        ),
        _Part(
            "`kill -9` while a run tunes",
            options["tuning"],
            killed,
            lambda n, folder: stress_tuning(n, seed, folder, nursery),
        ),
        _Part(
            "Mixtures of decoding requests",
            options["mixtures"],
            "mixtures",
            lambda n, folder: stress_mixtures(n, seed, folder),
        ),
        _Part(
            "Decoding over stages",
            options["stages"],
            "dozens of requests",
            lambda n, folder: stress_stages(n, seed, folder),
        ),
        _Part("Speculation", options["speculation"], "prompts", lambda n, folder: stress_speculation(n, seed, folder)),
        _Part("Memory over many tokens", options["growth"], "tokens", lambda n, folder: stress_growth(n, seed, folder)),
        _Part(
            "Thresholds with a guarantee",
            options["calibrations"],
            "calibrations of a kind",
            lambda n, folder: stress_calibrations(n, seed, folder),
        ),
        _Part(
            "Requests of the server's OpenAPI",
            options["requests"],
            "requests at least",
            lambda n, folder: stress_requests(n, seed, folder),
        ),
        _Part(
            "Idle connections to the server",
            options["connections"],
            "connections",
            lambda n, folder: stress_connections(n, seed, folder),
        ),
        _Part("Load on the server", options["load"], "seconds of load", lambda n, folder: stress_load(n, seed, folder)),
    ]
    stories = [story for name, story in zip(COUNTS, stories, strict=True) if name in options["only"]]
    for story in stories:
        story.run(seed)
        write_record(options["output"], story)
    failures = [failure for story in stories for failure in story.failures]
    print(*failures[:20], f"{len(failures)} went wrong; {options['output']}", sep="\n")
    return 1 if failures else 0


class _Outcome(Protocol):
    failures: list[str]

    def table(self) -> str:
        """Markdown."""


class _Part:
    def __init__(self, title: str, count: int, what: str, stress: Callable[[int, Path], _Outcome]):
        self.title, self.count, self.what, self._stress = title, count, what, stress

    def run(self, seed: int) -> None:
        """In a folder of its own, which goes with it."""
        self.when = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, seed {seed}"
        since = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ee-tuning-stress-") as folder:
            outcome = self._stress(self.count, Path(folder))
        self.seconds, self.table, self.failures = time.monotonic() - since, outcome.table(), outcome.failures
        print(
            f"{self.title}: {self.count} {self.what}, {len(self.failures)} went wrong, {self.seconds:.0f} s", flush=True
        )

    def told(self) -> str:
        """A section of the record."""
        verdict = "none went wrong" if not self.failures else f"**{len(self.failures)} went wrong**"
        wrong = "".join(f"\n- {' '.join(failure.split())[:400]}" for failure in self.failures[:20])
        return f"## {self.title}\n\n{self.when}: {self.count} {self.what} in {self.seconds:.0f} s; {verdict}.\n\n{self.table}\n{wrong}"


def write_record(path: Path, story: _Part) -> None:
    """Puts a part into the record, in the place of what it told before."""
    import torch

    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    head = (
        f"# Stress\n\nWritten by `make stress` on {os.cpu_count()} cores of: {cpu}; Python {sys.version.split()[0]}, torch "
        f"{torch.__version__}, CPU. `make test` runs a few of each by the same code.\n\n{_MEANING}"
    )
    parts = ["## " + part.rstrip() for part in path.read_text().split("\n## ")[1:]] if path.exists() else []
    kept = [part for part in parts if not part.startswith(f"## {story.title}\n")]
    path.write_text("\n\n".join([head.rstrip(), *sorted([*kept, story.told().rstrip()])]) + "\n")


_MEANING = """\
What the columns mean: a damaged file is **refused** when loading ends in an InputError of one line that names it, and **unharmed** when
all is loaded byte for byte as it was. A folder of a stranger's has no checksums: a flipped bit in a weight, tensors under each other's
names or a type of the same width make **another model**, soundly stored; where it is one to the fingerprint (four rows of each tensor),
exits made for the true one refuse it, and otherwise no reader can know. Folders that this project wrote have a manifest, so there
nothing is unknowable. Anything else (a wrong model in silence, a traceback, more than 20 s or 1 GB, a pickle that ran) counts as wrong.

A killed command may leave the former output, the new one, or nothing where nothing was; never anything else that loads, and the same
command then runs to its end and leaves no litter. A killed run goes on to the same bits (masters, moments, records, artifact) as one
never stopped.
"""

if __name__ == "__main__":
    get_temp_dir()  # multiprocessing's own, which it removes later than this folder
    # What killed processes leave goes with it.
    with tempfile.TemporaryDirectory(prefix="ee-tuning-stress-") as own:
        os.environ["TMPDIR"] = tempfile.tempdir = own
        sys.exit(main())
