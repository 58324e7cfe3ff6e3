"""`generate --output FILE`: what is finished is kept whatever ends the command, and the same command goes on."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from exits import write_exits

from ee_tuning import cli
from ee_tuning.config import ParallelSection
from ee_tuning.demo.demo import CHECKOUT
from ee_tuning.errors import InputError
from ee_tuning.generation import delivery, depth_budget
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.delivery import InOrder
from ee_tuning.generation.depth_budget import DepthTimes
from ee_tuning.generation.output_file import OutputFile, check_output, owned_output
from ee_tuning.generation.record import as_record
from ee_tuning.json_file import to_json
from ee_tuning.parallel.topology import init_parallel

MODEL = CHECKOUT / "examples" / "tiny-python-llama"
JOB = {"model": "abc", "temperature": 0.5, "prompts": "1f"}
COMMAND = f"generate --model {MODEL} --policy full --max-new-tokens 6 --ignore-eos --max-batch-size 2".split()
LINES = [
    {"prompt": "def f(", "id": "first", "max_new_tokens": 12},
    {"prompt": "x", "temperature": -1, "id": 7},
    {"prompt": "import ", "n": 2, "temperature": 0.9},
    {"prompt": "class A", "meta": {"of": [1, None]}},
]


def record(place: int, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"prompt_index": place, "index": index, "text": f"{place}.{index}", **more}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def texts(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (r.get("id"), r.get("meta"), r["prompt"], r["prompt_index"], r.get("index"), r.get("text"), r.get("error"))
        for r in records
    ]


def test_records_are_kept_at_once_and_put_in_order_at_the_end(tmp_path: Path):
    """Finished completions that a kill takes along; a torn line that stops the next start, or stands in the file."""
    path = tmp_path / "new" / "out.jsonl"
    first = OutputFile(path, JOB, 3, overwrites=False)
    assert list(tmp_path.iterdir()) == [], "nothing is touched before there is a result"
    first.write(record(2))
    first.write(record(0, 1))
    assert [line.get("text") for line in lines(first.journal)] == [None, "2.0", "0.1"] and not path.exists()
    first.close()
    with first.journal.open("ab") as file:
        file.write(b'{"prompt_index": 0, "ind')
    again = OutputFile(path, JOB, 3, overwrites=False)
    assert again.done == {(2, 0), (0, 1)}
    again.write(record(0, 1, text="once more"))
    again.write(record(0, 0))
    again.fail({"prompt_index": 1, "error": "no"})
    again.finish()
    again.close()
    assert [line.get("text", "error") for line in lines(path)] == ["0.0", "0.1", "error", "2.0"]
    assert os.listdir(path.parent) == ["out.jsonl"]
    whole = OutputFile(path, JOB, 3, overwrites=False)
    assert whole.is_whole and whole.num_errors == 1


def test_another_job_is_refused_and_overwrite_begins_anew(tmp_path: Path):
    """Completions of two temperatures in one file; an old file that is gone though the new job never came to a
    result.
    """
    path = tmp_path / "out.jsonl"
    first = OutputFile(path, JOB, 1, overwrites=False)
    first.write(record(0))
    first.close()
    with pytest.raises(InputError, match=r"differs in temperature \(0.5 there, 0 here\); .*--overwrite"):
        OutputFile(path, {**JOB, "temperature": 0}, 1, overwrites=False)
    with pytest.raises(InputError, match="differs in its prompts"):
        OutputFile(path, {**JOB, "prompts": "2e"}, 1, overwrites=False)
    OutputFile(path, JOB, 1, overwrites=False).finish()
    before = path.read_bytes()
    for other, num_prompts, words in (
        ({**JOB, "temperature": 0}, 1, "of another job"),
        (JOB, 2, "1 of this job's 2 prompts"),
    ):
        with pytest.raises(InputError, match=words):
            OutputFile(path, other, num_prompts, overwrites=False)
    anew = OutputFile(path, {**JOB, "temperature": 0}, 1, overwrites=True)
    assert path.read_bytes() == before
    anew.write(record(0, text="new"))
    assert path.read_bytes() == before
    anew.finish()
    anew.close()
    assert [line["text"] for line in lines(path)] == ["new"]


def test_a_damaged_journal_and_a_file_of_something_else_are_refused(tmp_path: Path):
    """Notes of a user's own that are replaced by completions, or a journal half of which is silently made again."""
    notes = tmp_path / "notes.txt"
    notes.write_text("mine\n")
    for path, words in (
        (notes, "is not what"),
        (tmp_path, "got the folder"),
        (notes / "x", "no folder that can be written"),
    ):
        with pytest.raises(InputError, match=words):
            check_output(path, overwrites=False)
    check_output(notes, overwrites=True)
    (tmp_path / "empty").touch()
    check_output(tmp_path / "empty", overwrites=False)
    out = OutputFile(tmp_path / "out", JOB, 2, overwrites=False)
    for place in range(2):
        out.write(record(place))
    out.close()
    out.journal.write_bytes(out.journal.read_bytes().replace(b'"0.0"', b'"0.0'))
    with pytest.raises(InputError, match=r"line 2 of .* is damaged"):
        OutputFile(tmp_path / "out", JOB, 2, overwrites=False)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A traceback, and hours of completions with it."""
    out = OutputFile(tmp_path / "out", JOB, 2, overwrites=False)
    out.write(record(0))

    def refuse(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ee_tuning.storage.appended_file.AppendedFile.append", refuse)
    with pytest.raises(InputError, match=r"No space left on device; .*1 completions are kept in .*out.partial"):
        out.write(record(1))
    monkeypatch.undo()
    out.write(record(1))
    monkeypatch.setattr("ee_tuning.storage.atomic_write._sync", refuse)
    with pytest.raises(InputError, match=r"No space left on device; .*2 completions are kept"):
        out.finish()
    out.close()
    assert os.listdir(tmp_path) == ["out.partial"]


def test_a_stream_gets_records_in_order_as_soon_as_they_can_be(tmp_path: Path):
    """A refused line before all others; hours without a line on a pipe; records that Ctrl-C takes along."""

    class Stream:
        def __init__(self) -> None:
            self.name, self.said = "pipe", list[int]()

        def write(self, text: str) -> None:
            self.said += [json.loads(text)["prompt_index"]] if text.strip() else []

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    stream = Stream()
    out = InOrder(stream, [1, 2, 2, 1, 1])  # type: ignore[arg-type]
    out.fail({"prompt_index": 2, "error": "no"})
    out.write(record(1))
    out.write(record(0))
    assert stream.said == [0]
    out.write(record(1, 1))
    assert stream.said == [0, 1, 1, 2]
    out.write(record(4))
    out.close()
    assert stream.said == [0, 1, 1, 2, 4]


@pytest.mark.parametrize("ends_by", [KeyboardInterrupt, SystemExit])
def test_the_same_command_goes_on(
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends_by: type[BaseException],
):
    """All completions lost by Ctrl-C; other tokens after going on; refused lines before all others, and keys that are
    lost.
    """
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert cli.main([*COMMAND, "--prompts", str(prompts), "--output", str(whole)]) == 2
    assert [(r.get("id"), r["prompt_index"], r.get("index")) for r in lines(whole)] == [
        ("first", 0, 0),
        (7, 1, None),
        (None, 2, 0),
        (None, 2, 1),
        (None, 3, 0),
    ]
    assert lines(whole)[4]["meta"] == {"of": [1, None]} and "temperature" in lines(whole)[1]["error"]
    told, kept = delivery.CompletionProgress.completion, []

    def stop(progress: delivery.CompletionProgress) -> None:
        told(progress)
        kept.append(progress)
        if len(kept) == 2:
            raise ends_by(143)

    command = [*COMMAND, "--prompts", str(prompts), "--output", str(stopped)]
    monkeypatch.setattr(delivery.CompletionProgress, "completion", stop)
    if ends_by is SystemExit:
        with pytest.raises(SystemExit):
            cli.main(command)
    else:
        assert cli.main(command) == 130
    assert f"2 of 5 completions are kept in {stopped}.partial" in capsys.readouterr().err and not stopped.exists()
    monkeypatch.setattr(delivery.CompletionProgress, "completion", told)
    assert cli.main(command) == 2
    assert texts(lines(stopped)) == texts(lines(whole)) and not Path(f"{stopped}.partial").exists()
    before = stopped.read_bytes()
    capsys.readouterr()
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert "nothing is left to do" in told and "1 of 4 prompts could not be done" in told
    assert cli.main([*command, "--temperature", "0.3"]) == 2 and "of another job" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--top-p", "7"]) == 2 and "top_p" in capsys.readouterr().err
    assert stopped.read_bytes() == before


def test_a_budget_goes_on_with_the_exit_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Another exit within the budget at the second start, on a busier machine: the same command is another job then."""
    exits = write_exits(MODEL, tmp_path / "exits", exit_layers=[3, 6], architecture="norm", init="copy")
    times, out = [DepthTimes(1.0, {3: 0.3, 6: 0.6}), DepthTimes(1.0, {3: 0.3, 6: 0.4})], tmp_path / "out.jsonl"
    monkeypatch.setattr(depth_budget, "measure_depths", lambda *_: times.pop(0))
    command = [
        *COMMAND[:3],
        "--exits",
        str(exits),
        *COMMAND[5:],
        "--prompt",
        "def f(",
        "--prompt",
        "x",
        "--output",
        str(out),
    ]
    wait, kept = OutputFile.write, list[dict[str, Any]]()

    def stop(file: OutputFile, record: dict[str, Any]) -> None:
        wait(file, record)
        kept.append(record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OutputFile, "write", stop)
        assert cli.main([*command, "--budget", "0.5"]) == 130
    assert "budget 0.5: exit 3 of 12 layers, 0.30 of full" in capsys.readouterr().err
    assert cli.main([*command, "--budget", "0.5"]) == 0
    assert "budget 0.5: exit 3 of 12 layers, with which the output began" in capsys.readouterr().err
    assert [(set(each["exit_layers"]), each["budget"]) for each in lines(out)] == 2 * [
        ({3}, {"share": 0.5, "exit_layer": 3})
    ]
    assert cli.main([*command, "--budget", "0.5"]) == 0 and "nothing is left to do" in capsys.readouterr().err
    assert cli.main([*command, "--policy", "fixed", "--exit-layer", "3"]) == 0, "tokens depend on the exit alone"
    assert len(times) == 1 and cli.main([*command, "--budget", "0.45"]) == 2 and not times
    assert "exit 6" in (told := capsys.readouterr().err) and "of another job" in told


def test_nothing_is_touched_where_nothing_can_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An old file that is empty after a model's name was misspelt."""
    old, bad = tmp_path / "old.jsonl", tmp_path / "bad.jsonl"
    old.write_text("precious")
    bad.write_text('{"prompt": "x", "n": 0}\n{"prompt": "y", "n": -1}\n')
    for arguments in (
        ["--model", "/no/such", "--overwrite"],
        ["--top-p", "7", "--overwrite"],
        [],
        ["--prompts", str(bad), "--overwrite"],
    ):
        assert (
            cli.main(
                [*COMMAND, *([] if "--prompts" in arguments else ["--prompt", "x"]), "--output", str(old), *arguments]
            )
            == 2
        )
        assert capsys.readouterr().err.count("\n") == 1 and old.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "old.jsonl"]


def test_a_token_without_probability_has_a_log_probability_that_json_can_hold():
    """-Infinity among the top_logprobs of a distribution that top-k cut, which no JSON reader takes."""
    made = Completion(
        prompt="x", token_ids=[5], logprobs=[0.0], top_logprobs=[{5: 0.0, 3: -math.inf}], confidences=[math.nan]
    )
    told = json.loads(to_json(as_record(made, {"id": 3})), parse_constant=pytest.fail)
    assert (told["top_logprobs"], told["logprobs"], told["id"]) == ([{"5": 0.0, "3": -9999.0}], [0.0], 3)


def test_a_file_has_one_owner_and_a_stream_none(tmp_path: Path):
    """Two commands into one file, each of whose completions replace the other's; a pipe that only one command may write
    to.
    """
    topology, path, link, pipe = (
        init_parallel(ParallelSection()),
        tmp_path / "out.jsonl",
        tmp_path / "link.jsonl",
        tmp_path / "pipe",
    )
    link.symlink_to(path)
    os.mkfifo(pipe)
    with owned_output(path, topology):
        with (
            pytest.raises(InputError, match=rf"out\.jsonl is being written by process {os.getpid()} on "),
            owned_output(link, topology),
        ):
            pass
        with owned_output(pipe, topology), owned_output(pipe, topology), owned_output(None, topology):
            pass
    assert sorted(os.listdir(tmp_path)) == ["link.jsonl", "pipe"]
