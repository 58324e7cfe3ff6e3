"""`ee-tuning compare`: what it refuses, that no step is done twice, and that one way's failure is one row."""

import dataclasses
import html.parser
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from random_models import random_llama
from refusals import refusal

from ee_tuning import cli
from ee_tuning.checkpoint.formats import read_shape
from ee_tuning.comparison import texts
from ee_tuning.comparison.command import compare
from ee_tuning.comparison.entries import entries_of
from ee_tuning.comparison.job import CompareOptions, Comparison, as_compared, depths_of
from ee_tuning.comparison.rows import BASELINE
from ee_tuning.comparison.texts import LOSS_TASK, SPEED_TASK, Texts
from ee_tuning.comparison.ways import WAYS, all_steps
from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError

pytestmark = pytest.mark.slow

SOME = ("exits", "pruned", "healed-kl", "sorted")
TEXT = "".join(f"def f{n}(x):\n    return [x + {n} for x in range({n % 7})] or leave(early={n})\n" for n in range(400))
TINY = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, text.txt, noise.bin."""
    folder = tmp_path_factory.mktemp("compare")
    random_llama(folder / "model", vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END, **TINY)
    write_byte_tokenizer(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "photo").write_bytes(bytes(range(256)) * 40)
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").touch()
    return folder


def job(shared: Path, **changes: object) -> Config:
    keys = {
        "model.path": str(shared / "model"),
        "data.paths": [str(shared / "text.txt")],
        "data.cache": str(shared / "cache"),
        "tuning.seq_length": 32,
        "tuning.micro_batch_size": 4,
        "tuning.global_batch_size": 4,
        "generation.max_new_tokens": 4,
        "generation.max_batch_size": 1,
    }
    return load_config(None, {**keys, **changes})


def options(output: Path, **changes: object) -> CompareOptions:
    plain = CompareOptions(
        output=output, tokens=300, ways=SOME, depths=(0.5,), thresholds=(0.1,), num_samples=2, num_prompts=1, repeats=1
    )
    return dataclasses.replace(plain, **changes)


def recorded(ran: list[str], fails: str = "") -> Callable[[list[str], Path], None]:
    """Runs commands in this process, and records their logs' names."""

    def run(command: list[str], log: Path) -> None:
        ran.append(log.stem)
        if log.stem == fails:
            raise InputError("the machine is out of luck")
        if cli.main(command[3:]):
            raise InputError(f"{log.stem} failed")

    return run


@pytest.fixture(scope="module")
def finished(shared: Path) -> tuple[Path, list[str], int]:
    """A comparison, what was run for it, and its exit code."""
    ran: list[str] = []
    code = compare(job(shared), options(shared / "finished"), recorded(ran))
    return shared / "finished", ran, code


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "compare.json").read_text())["rows"]


def test_all_ways_are_measured_alike(finished: tuple[Path, list[str], int]):
    """Ways on other texts or other numbers of tokens, a shared step done twice, ratios to another model than the
    whole one.
    """
    folder, ran, code = finished
    assert code == 0 and len(ran) == len(set(ran))
    assert ran == [
        "fitted", "exits", "exits-evaluate",
        "pruned-2", "pruned-2-evaluate",
        "healed-kl-2", "healed-kl-2-merge", "healed-kl-2-evaluate",
        "sorted", "sorted-evaluate",
    ]  # fmt: skip
    found = rows(folder)
    assert [(row["way"], row["name"]) for row in found] == [
        (BASELINE, "4 layers"),
        ("exits", "exit 2"),
        ("exits", "threshold 0.1"),
        ("exits", "speculative"),
        ("pruned", "2 layers"),
        ("healed-kl", "2 layers"),
        ("sorted", "4 layers"),
        ("sorted", "exit 2"),
        ("sorted", "threshold 0.1"),
        ("sorted", "speculative"),
    ]
    assert {row["tuning_tokens"] for row in found} == {0, 2 * 128}
    whole, exit, *_ = found
    pruned, healed, trained = (
        next(row for row in found if row["way"] == way) for way in ("pruned", "healed-kl", "sorted")
    )
    assert whole["speedup"]["value"] == 1 and pruned["loss"] != healed["loss"]
    assert pruned["disk_bytes"] < whole["disk_bytes"] < exit["disk_bytes"]
    assert pruned["memory_bytes"] < whole["memory_bytes"] < exit["memory_bytes"]
    assert (
        trained["loss"] != whole["loss"] and trained["disk_bytes"] > whole["disk_bytes"]
    )  # what was trained lies beside
    settings = [
        json.loads((folder / "evaluations" / name / "evaluation.json").read_text())["settings"]
        for name in ("exits", "pruned-2", "healed-kl-2", "sorted")
    ]
    for task in (LOSS_TASK, SPEED_TASK):
        assert len({each[f"task {task}"] for each in settings}) == 1
    assert settings[1]["--against"] == settings[3]["--against"] == settings[0]["model"]


def test_a_second_run_does_nothing_twice(shared: Path, finished: tuple[Path, list[str], int], tmp_path: Path):
    """Hours of tuning done again after a kill in the last step."""
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    before, ran = rows(folder), list[str]()
    for lost in ("evaluations/pruned-2", "healed-kl-2/model"):
        shutil.rmtree(folder / lost)
    assert compare(job(shared), options(folder), recorded(ran)) == 0
    assert ran == ["pruned-2-evaluate", "healed-kl-2-merge"]
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in before]


def test_a_way_that_fails_is_a_row(
    shared: Path, finished: tuple[Path, list[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A comparison of a night that ends at its first error; a failure that is told as success."""
    folder = tmp_path / "failing"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "pruned-2")
    ran: list[str] = []
    assert compare(job(shared), options(folder), recorded(ran, fails="pruned-2")) == 1
    assert ran == ["pruned-2"], "what needs the broken step is not tried"
    found = rows(folder)
    assert [row["kind"] for row in found if row["way"] in ("pruned", "healed-kl")] == ["failed", "failed"]
    assert any(row["way"] == "exits" and row["loss"] for row in found)
    shown, page = capsys.readouterr().out, (folder / "index.html").read_text()
    assert "pruned-2 is left out: the machine is out of luck" in shown
    assert "out of luck" in page


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_every_row(finished: tuple[Path, list[str], int]):
    """A page that a browser repairs, or a way that is missing from it."""
    page = _Page()
    page.feed((finished[0] / "index.html").read_text())
    assert not page.open and page.counts["tr"] == 1 + len(rows(finished[0])) and page.counts["img"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--ways", "exits", "distil"], "--ways must be some of exits, .*got distil"),
        (["--tokens", "100"], "--tokens must be at least 128, one step of 4 sequences of 32, got 100"),
        (
            ["--seq-length", "2", "--tokens", "17", "--ways", "fitted"],
            "--tokens must be more than 16 for the way fitted, .*got 16",
        ),
        (["--global-batch-size", "0"], "tuning.global_batch_size must be at least 1, got 0"),
        (["--nproc", "2"], "tuning.global_batch_size must be a multiple of .*got 4; set it to 8"),
        (["--seq-length", "200"], "tuning.seq_length must lie in 1..128"),
        (["--tensor-model-parallel-size", "0"], "parallel sizes must be at least 1, got 0 and 1"),
        (["--depth", "0.1"], r"--depth must leave 2 to 3 of the model's 4 layers, .*got 0"),
        (["--depth", "1.5"], "--depth must be shares of the layers between 0 and 1, got 1.5"),
        (["--depth", "half"], "--depth must be numbers, got half"),
        (["--depth", "0.5", "--exit-layers", "2"], "--depth and --exit-layers both say"),
        (["--exit-layers", "4"], "--depth must leave 2 to 3 of the model's 4 layers"),
        (["--lr", "exits=fast"], "--lr takes a number"),
        (["--lr", "distil=1"], "--lr names 'distil', which is no way"),
        (["--ways", "fitted,exits", "--lr", "fitted=1"], "fitted=1 is of none in --ways fitted,exits; leave it out"),
        (["--ways", "fitted", "--lr", "1e-3"], "1e-3 is of none in --ways fitted; leave it out"),
        (["--trainable", "ears"], "tuning.trainable must be heads, lora"),
        (["--metric", "exact"], "--metric is of --task"),
        (["--task", "text.txt"], "--metric must be given once"),
        (["--data", "photo"], "photo must be UTF-8 text"),
        (["--data", "nothing"], "nothing does not exist"),
        (["--output", "other"], "--output must be a new folder or that of a comparison, and other holds thesis.tex"),
        (["--output", "model/o"], "--output must lie apart from"),
        (["--nproc", "3", "--tensor-model-parallel-size", "2"], "--nproc must be a multiple of tensor × pipeline = 2"),
        (["--adapter", "x"], "takes no --adapter"),
        (["--trust-pickle"], "without model.config and model.trust_pickle"),
        (["--set", "generation.budget=0.5"], "generation.budget chooses one"),
        (["--architecture", "norm,mlp,norm"], "exits.architecture must be one word or one per exit, 2 for"),
        (["--output-vocab", "9999"], "exits.output_vocab must be at least 1 and below"),
        (["--exit-output", "shared"], "exits.output = shared is the way sorted"),
        (["--pipeline-model-parallel-size", "5"], "pipeline_model_parallel_size must be at most the model's 4 layers"),
        (["--set", "generation.max_batch_size=0"], "generation.max_batch_size must be at least 1, got 0"),
        (["--set", "generation.temperature=1"], "decodes greedily, so generation.temperature must be 0.0, got 1"),
        (["--max-new-tokens", "0"], "max_tokens"),
        (["--set", "tuning.loss=foo"], "tuning.loss must be made of"),
        (["--set", "tuning.lora_rank=0"], "tuning.lora_rank must be at least 1, got 0"),
    ],
    ids=lambda given: "-".join(given[:2]).strip("-") if isinstance(given, list) else "",
)
def test_what_can_not_be_compared_is_one_line(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], said: str
):
    """A comparison that fails after an hour for a word that was wrong from the start, and leaves half a folder."""
    monkeypatch.chdir(shared)
    plain = {"--data": "text.txt", "--output": "new", "--tokens": "200", "--model": "model", "--seq-length": "32"}
    words = [word for flag, value in plain.items() if flag not in given for word in (flag, value)]
    before = sorted(shared.rglob("*"))
    assert cli.main(["compare", *words, "--set", "data.cache=cache", *given]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert re.search(said, told.err), told.err
    assert [path for path in sorted(shared.rglob("*")) if "cache" not in path.parts] == [
        path for path in before if "cache" not in path.parts
    ]


def test_a_folder_of_another_job_is_refused(shared: Path, finished: tuple[Path, list[str], int]):
    """Rows of two jobs in one table."""
    said = refusal(compare, job(shared), options(finished[0], tokens=1000), recorded([]))
    assert "holds a comparison of another job, which differs in tokens (300 there, 1000 here)" in said
    said = refusal(compare, job(shared, **{"tuning.seed": 5}), options(finished[0]), recorded([]))
    assert "tuning.seed (1234 there, 5 here)" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text/settings.json", "[]", "holds no settings of a comparison; give another --output"),
        ("text/settings.json", '{"learning rates": 3}', "holds no settings of a comparison"),
        ("evaluations/sorted/evaluation.json", "{}", "is damaged: it has no 'tasks'; .*, and it is measured again"),
        ("evaluations/sorted/evaluation.json", '{"tasks": []}', "is damaged: .*, and it is measured again"),
    ],
)
def test_a_damaged_file_of_an_earlier_run_is_one_line(
    shared: Path, finished: tuple[Path, list[str], int], tmp_path: Path, name: str, content: str, said: str
):
    """A traceback where a file was cut off or edited."""
    shutil.copytree(finished[0], tmp_path / "o")
    (tmp_path / "o" / name).write_text(content)
    assert re.search(said, refusal(compare, job(shared), options(tmp_path / "o"), recorded([])))


def test_ranks_of_torchrun_are_refused(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Four processes that each start all commands."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "start it without torchrun" in refusal(compare, job(shared), options(tmp_path / "o"), recorded([]))


def test_the_plan_says_what_everything_takes(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A night of tuning that nobody asked for; a dry run that leaves a folder."""
    plan = options(tmp_path / "o", dry_run=True, tokens=640, depths=(0.75, 0.5), ways=("exits", "healed-ce"))
    assert compare(job(shared), plan, recorded([])) == 0
    shown = capsys.readouterr().out
    assert "4 layers, against 3 and 2 of them: 2 ways" in shown and "reads 640 tokens in 5 steps of 4 × 32" in shown
    assert "are left, 2,560 tokens" in shown, "a fit and three runs"
    assert not list(tmp_path.iterdir())


def test_every_command_of_a_plan_parses(shared: Path, tmp_path: Path):
    """A flag that was renamed, or of two depths only the last; found when the night's tuning is done."""
    commands: list[list[str]] = []
    config = as_compared(job(shared), read_shape(job(shared).model))
    comparison = Comparison(
        config=config,
        options=options(tmp_path, ways=tuple(WAYS), tasks=(shared / "t.jsonl",), metrics=("exact",), num_processes=2),
        shape=read_shape(config.model),
        depths=(3, 2),
        metrics={},
        run_command=lambda command, log: commands.append(command),
    )
    entries = entries_of(comparison, Texts(tmp_path / "text", config.data))
    for step in all_steps([entry for _, entry in entries]):
        step.run()
    parsed = [cli.parse(command[command.index("ee_tuning") + 1 :]) for command in commands]
    assert {args.command.name for args in parsed} == {"convert", "tune", "prune", "export", "evaluate"}
    assert all("torch.distributed.run" in command for command in commands)
    assert [args.fixed for args in parsed if args.command.name == "evaluate" and args.fixed] == [[2, 3]] * 4
    assert {way for way, _ in entries} == set(WAYS)


def test_depths_are_shares_or_layers(shared: Path, tmp_path: Path):
    """A quarter left out that becomes a quarter kept."""
    layers = job(shared, **{"exits.exit_layers": [3, 6]})
    assert depths_of(layers, options(tmp_path, depths=()), 8) == (6, 3)
    assert depths_of(job(shared), options(tmp_path, depths=()), 12) == (9, 6)
    assert depths_of(job(shared), options(tmp_path, depths=(0.9, 0.5)), 30) == (27, 15)


def test_a_lone_text_is_cut_into_documents_and_nothing_else(tmp_path: Path):
    """A byte order mark as the first character that a model learns; lines lost between two documents."""
    path, content = tmp_path / "book.txt", "".join(f"line {number}\n" for number in range(2000))
    path.write_text(content, encoding="utf-8-sig")
    documents = list(texts._pieces(path))
    assert "".join(documents).rstrip("\n") == content.rstrip("\n") and len(documents) >= 32


def test_kinds_of_exits_are_of_the_way_exits_alone(shared: Path, tmp_path: Path):
    """`--architecture mlp` refused for the sub-models of `sorted`, and a shortlist for `tied`."""
    given = job(shared, **{"exits.architecture": ["mlp"], "exits.output_vocab": 40, "tuning.seq_length": 16})
    ran: list[str] = []
    assert compare(given, options(tmp_path / "o", tokens=70, ways=("tied", "sorted")), recorded(ran)) == 0
    assert ran == ["tied", "tied-evaluate", "sorted", "sorted-evaluate"]


def test_a_text_that_does_not_do_is_named(shared: Path, tmp_path: Path):
    """An error that names a file of documents which the command itself has made and removed."""
    (tmp_path / "copies.txt").write_text("early exits leave early\n" * 400)
    said = refusal(compare, job(shared, **{"data.paths": [str(tmp_path / "copies.txt")]}), options(tmp_path / "o"))
    assert f"(0.05 of the documents of {tmp_path / 'copies.txt'}) holds only 26" in said
    assert "partial" not in said and not (tmp_path / "o" / "text").exists()
