"""Task files: what a line may say, and what is said of one that may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from ee_tuning.errors import InputError
from ee_tuning.evaluation.task import read_task

CHAT = [{"role": "user", "content": "Capital of France?"}]


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "task.jsonl"
    path.write_text(
        "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8"
    )
    return path


def test_lines_become_items(tmp_path: Path):
    """A choice by its text taken for another, one stop string taken for its letters, an empty line for a prompt, a
    limit for none.
    """
    first, second, third = read_task(
        written(
            tmp_path,
            {"prompt": "2 + 2 =", "answer": "4", "max_new_tokens": 3, "stop": "\n"},
            "",
            {"messages": CHAT, "answers": ["Paris", "paris"], "id": "fr", "source": "mine"},
            {"prompt": "The sky is", "choices": [" blue", " green"], "answer": " green"},
            {"prompt": "x", "answer": "y"},
        ),
        "contains",
        limit=3,
    ).items
    assert (first.answers, first.max_new_tokens, first.stop, first.id) == (("4",), 3, ("\n",), 1)
    assert (second.messages, second.answers, second.id, second.prompt) == (tuple(CHAT), ("Paris", "paris"), "fr", None)
    assert (third.answers, third.right, third.choices) == ((" green",), 1, (" blue", " green"))


def test_a_task_is_known_by_what_it_asks(tmp_path: Path):
    """An evaluation that goes on with other answers, or is refused because its file was moved."""
    (tmp_path / "b").mkdir()
    lines: list[Any] = [{"prompt": "x", "answer": "y"}]
    task = read_task(written(tmp_path, *lines), "exact")
    assert task.digest() == read_task(written(tmp_path / "b", *lines), "exact").digest()
    assert task.digest() != read_task(written(tmp_path, {"prompt": "x", "answer": "z"}), "exact").digest()
    assert task.digest() != read_task(written(tmp_path, *lines), "contains").digest()


@pytest.mark.parametrize(
    ("lines", "metric", "words"),
    [
        ([], "exact", "which is empty"),
        (["{"], "exact", ":1: a line must be a JSON object"),
        (["[1]"], "exact", "must be a JSON object"),
        ([{"answer": "x"}], "exact", "neither"),
        ([{"prompt": "x", "messages": CHAT, "answer": "x"}], "exact", "both"),
        ([{"prompt": "x"}], "exact", '"choices", got none'),
        ([{"prompt": "x", "answers": []}], "exact", "got none"),
        ([{"prompt": "x", "answer": ""}], "exact", "an empty one"),
        ([{"prompt": "x", "answer": 4}], "exact", "numbers in quotes"),
        ([{"prompt": "x", "answer": "x", "answers": ["x"]}], "exact", "not both"),
        ([{"prompt": CHAT, "answer": "x"}], "exact", '"messages"'),
        ([{"messages": [], "answer": "x"}], "exact", "must end with"),
        ([{"messages": "hi", "answer": "x"}], "exact", "list of messages"),
        (
            [{"messages": [*CHAT, {"role": "assistant", "content": "Paris"}], "answer": "x"}],
            "exact",
            'goes into "answer"',
        ),
        ([{"prompt": "x", "choices": ["a"], "answer": 0}], "choice", "at least two"),
        ([{"prompt": "x", "choices": ["a", "b"]}], "choice", "None"),
        ([{"prompt": "x", "choices": ["a", "b"], "answer": 2}], "choice", "counted from 0, got 2"),
        ([{"prompt": "x", "choices": ["a", "b"], "answer": True}], "choice", "got True"),
        ([{"prompt": "x", "answer": "y"}], "choice", "exact, contains, rouge-l and perplexity apply to it"),
        ([{"prompt": "x", "answers": ["y", "z"]}], "perplexity", "one answer, got 2"),
        ([{"prompt": "x", "answer": "y"}], "bleu", "one of exact"),
        ([{"prompt": "x", "answer": "y", "max_new_token": 3}], "exact", "did you mean 'max_new_tokens'"),
        ([{"prompt": "x", "answer": "y", "max_new_tokens": 0}], "exact", "at least 1, got 0"),
        ([{"prompt": "x", "answer": "y", "stop": [""]}], "exact", "must not be empty"),
        ([{"prompt": "x", "answer": "y", "id": []}], "exact", "id"),
    ],
    ids=str,
)
def test_what_is_no_task_is_refused_by_its_line(tmp_path: Path, lines: list[Any], metric: Any, words: str):
    """A traceback, or a score of nought, for a task whose answers have another name."""
    with pytest.raises(InputError) as error:
        read_task(written(tmp_path, *lines), metric)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300, str(error.value)


def test_a_file_that_can_not_be_read(tmp_path: Path):
    """A traceback for a file that is not there, or is packed."""
    with pytest.raises(InputError, match="can not be read: No such file"):
        read_task(tmp_path / "none.jsonl", "exact")
    (tmp_path / "packed.jsonl").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(InputError, match="in UTF-8"):
        read_task(tmp_path / "packed.jsonl", "exact")
