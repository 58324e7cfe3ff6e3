"""Outputs go where no input is read, whichever command writes them."""

from pathlib import Path

import pytest
from byte_tokenizer import write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

from ee_tuning import cli
from ee_tuning.errors import InputError
from ee_tuning.storage.apart import check_apart, is_ours


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, exits/, texts/, text.txt and job.yaml"""
    folder = tmp_path_factory.mktemp("apart")
    random_llama(folder / "model", vocab_size=257, eos_token_id=256, bos_token_id=256)
    write_byte_tokenizer(folder / "model")
    write_exits(folder / "model", folder / "exits")
    (folder / "texts").mkdir()
    for file in (folder / "texts" / "a.txt", folder / "text.txt"):
        file.write_text("early exits leave early. " * 400)
    (folder / "job.yaml").write_text("tuning: {seed: 1}\n")
    (folder / "link").symlink_to(folder / "texts")
    return folder


TUNE = ["tune", "--model=model", "--exits=exits", "--train-iters=1", "--seq-length=64", "--set=tuning.eval_iters=0"]
COMMANDS = {
    "tune in the model": [*TUNE, "--data=texts", "--output=model/run"],
    "tune in the data": [*TUNE, "--data=texts", "--output=texts/deep/run"],
    "tune by a link": [*TUNE, "--data=texts", "--output=link/run"],
    "tune in the exits": [*TUNE, "--data=texts", "--output=exits/run"],
    "tune as the data": [*TUNE, "--data=texts", "--output=texts"],
    "tune around the data": [*TUNE, "--data=texts", "--output=."],
    "tune in what is held out": [*TUNE, "--data=text.txt", "--set=data.valid_paths=texts", "--output=texts/run"],
    "cache in the data": [*TUNE, "--data=texts", "--output=run", "--set=data.cache=texts/cache"],
    "convert": ["convert", "--model=model", "--exit-layers=2", "--output=model/exits"],
    "preprocess": ["preprocess", "--data=texts", "--tokenizer=model", "--output=texts/tokens"],
    "preprocess in the tokenizer": ["preprocess", "--data=text.txt", "--tokenizer=model", "--output=model/tokens"],
    "export exits": ["export", "--format=artifact", "--exits=exits", "--only=2", "--output=exits/two"],
    "export a model": ["export", "--format=hf", "--model=model", "--exits=exits", "--output=model/export"],
    "calibrate": ["calibrate", "--model=model", "--exits=exits", "--data=texts", "--output=texts/calibration.json"],
    "generate": [
        "generate",
        "--model=model",
        "--policy=full",
        "--prompts=text.txt",
        "--output=text.txt",
        "--overwrite",
    ],
    "calibrate in the exits": [
        "calibrate",
        "--model=model",
        "--exits=exits",
        "--data=texts",
        "--output=exits/calibration.json",
    ],
    "calibrate as the job": [
        "calibrate",
        "job.yaml",
        "--model=model",
        "--exits=exits",
        "--data=texts",
        "--output=job.yaml",
    ],
    "generate as the model's config": [
        "generate",
        "--model=model",
        "--policy=full",
        "--prompt=a",
        "--output=model/config.json",
        "--overwrite",
    ],
    "generate as the job": [
        "generate",
        "job.yaml",
        "--model=model",
        "--policy=full",
        "--prompt=a",
        "--output=job.yaml",
        "--overwrite",
    ],
    "regenerate in the model": ["regenerate", "--model=model", "--data=text.txt", "--output=model/answers.jsonl"],
    "profile in the model": ["profile", "--model=model", "--output=model/profile.png"],
    "profile": ["profile", "--model=model", "--text=text.txt", "--output=text.txt"],
    "prune in the model": ["prune", "--model=model", "--drop=3", "--output=model/pruned"],
    "prune in the exits": [
        "prune",
        "--model=model",
        "--exits=exits",
        "--drop=3",
        "--output=pruned",
        "--exits-output=exits/pruned",
    ],
    "prune drawn as the text": ["prune", "--model=model", "--data=text.txt", "--drop=3", "--picture=text.txt"],
}


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_writes_nothing_where_it_reads(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """A run whose metrics the next run learns, an export that a model's readers stumble over, a picture in place of the
    text.
    """
    monkeypatch.chdir(shared)
    before = written(shared)
    assert cli.main(COMMANDS[case]) == 2
    told = capsys.readouterr().err.strip()
    assert ("must lie apart from" in told or "must not be" in told) and "\n" not in told and "give another" in told, (
        told
    )
    assert written(shared) == before


@pytest.mark.parametrize("output", [".", "..", "/", "x/.."])
def test_an_output_has_a_name(capsys: pytest.CaptureFixture[str], output: str) -> None:
    """A traceback where a name is taken from a path that has none; a working folder that is replaced under its
    shell.
    """
    assert cli.main(["convert", "--model=model", "--exit-layers=2", f"--output={output}"]) == 2
    assert "--output must end in a name" in capsys.readouterr().err


def test_neighbours_are_apart(tmp_path: Path) -> None:
    """A refusal for a name that begins alike, for a model on the hub, or for a file beside the output."""
    (tmp_path / "data").mkdir()
    (tmp_path / "text").touch()
    sources = (tmp_path / "data", tmp_path / "text", "org/name", "0.3", None, "")
    for output in ("data2", "run", "data.bin", "text2"):
        check_apart(tmp_path / output, sources, around=True)
    check_apart(tmp_path, (tmp_path / "data",))
    check_apart(tmp_path, (tmp_path / "text",), around=True)
    for output in ("data", "text", "data/run", "data/../data/run"):
        with pytest.raises(InputError, match="give another --output"):
            check_apart(tmp_path / output, sources)


@pytest.mark.parametrize(
    ("files", "is_run"),
    [
        (["config.yaml", "metrics.jsonl"], True),
        (["exit_config.json"], True),
        (["config.yaml"], False),
        (["metrics.jsonl", "config.json"], False),
        ([], False),
    ],
)
def test_folders_of_ours_are_known_by_their_files(tmp_path: Path, files: list[str], is_run: bool) -> None:
    """A folder of somebody's data that is passed over, or a run that is learned."""
    for file in files:
        (tmp_path / file).touch()
    assert is_ours(tmp_path) == is_run
