"""The special tokens that config.json and generation_config.json name: checked where they are read, before anything is
decoded by them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ee_tuning import notices
from ee_tuning.errors import InputError
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.model_config.config import read_model_config
from ee_tuning.model_config.token_ids import generation_end_token_ids

TINY = Path(__file__).parents[2] / "examples" / "tiny-python-llama"
VOCABULARY = json.loads((TINY / "config.json").read_text())["vocab_size"]


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_shown_lines", set())


def folder_with(folder: Path, file: str, **changes: Any) -> Path:
    raw = json.loads((TINY / "config.json").read_text())
    if file == "config.json":
        raw.update(changes)
    (folder / "config.json").write_text(json.dumps(raw))
    if file != "config.json":
        (folder / file).write_text(json.dumps(changes))
    return folder


def end_ids(folder: Path) -> tuple[int, ...]:
    config = read_model_config(folder)
    named = generation_end_token_ids(folder, config.vocab_size)
    return config.eos_token_ids if named is None else named


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", [2, None], [[2]], [2, "3"], 2.0, 1.5, True, {"id": 2}, [float("nan")]])
def test_what_is_no_number_of_a_token_is_refused(tmp_path: Path, file: str, value: Any) -> None:
    """A traceback at the first token, or none at all: an id that is text is equal to no token."""
    with pytest.raises(InputError) as error:
        end_ids(folder_with(tmp_path, file, eos_token_id=value))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (file, "eos_token_id must be the number of a token", repr(value)))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("value", "wanted", "told"),
    [
        (2, (2,), None),
        ([2, 0, 2], (2, 0), None),
        (-1, (), -1),
        ([2, -1], (2,), -1),
        (VOCABULARY, (), VOCABULARY),
        ([10**9, 1], (1,), 10**9),
        ([], (), None),
    ],
)
def test_an_id_that_no_token_has_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, value: Any, wanted: tuple[int, ...], told: int | None
) -> None:
    """The last word of the vocabulary banned in its stead: -1 as an index counts from the end. transformers warns and
    goes on.
    """
    assert end_ids(folder_with(tmp_path, file, eos_token_id=value)) == wanted
    warning = capsys.readouterr().err
    assert (
        (not warning)
        if told is None
        else f"eos_token_id names {told}, which is no token of the vocabulary of {VOCABULARY}" in warning
    )


def test_null_leaves_it_to_the_other_file(tmp_path: Path) -> None:
    """generation_config.json may hold no more than a temperature."""
    wanted = end_ids(folder_with(tmp_path, "config.json", eos_token_id=3))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null, "temperature": 0.6}')
    assert end_ids(tmp_path) == wanted == (3,)


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_what_begins_and_pads_a_text_is_checked_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """An empty prompt that begins with a token past the vocabulary."""
    for value in ("1", [1], 1.0):
        with pytest.raises(InputError, match=f"{key} must be the number of a token, or null"):
            read_model_config(folder_with(tmp_path, "config.json", **{key: value}))
    assert not capsys.readouterr().err
    for value in (-1, VOCABULARY):
        config = read_model_config(folder_with(tmp_path, "config.json", **{key: value}))
        assert key == "pad_token_id" or config.bos_token_id is None
    assert f"{key} names {VOCABULARY}" in capsys.readouterr().err


def test_a_generation_config_that_is_broken_is_told(tmp_path: Path) -> None:
    """Read over in silence: the model then ends by other tokens than it was made to."""
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json is not JSON"):
        generation_end_token_ids(tmp_path, 10)
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": "x"}')
    with pytest.raises(
        InputError, match=r"generation_config.json: bos_token_id must be the number of a token, or null, got 'x'"
    ):
        generation_end_token_ids(tmp_path, 10)


def test_decoding_with_a_shortest_length_survives_them(tmp_path: Path) -> None:
    """--min-new-tokens bans the tokens that end a text: a traceback for one past the vocabulary."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, VOCABULARY]}))
    llm = EarlyExitLLM.load(folder)
    assert llm.stop_token_ids == ()
    said = llm.generate(["def main():"], policy="full", max_new_tokens=4, min_new_tokens=4)[0]
    plain = EarlyExitLLM.load(TINY).generate(["def main():"], policy="full", max_new_tokens=4, ignore_eos=True)[0]
    assert said.token_ids == plain.token_ids
