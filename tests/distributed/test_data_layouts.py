"""Every rank reads the data of its run from what one of them has tokenized: the same samples at every layout, chats and
blends too.
"""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from random_models import random_llama
from test_tuning import assert_same_records
from tuning_jobs import checkpoint, configure, records
from world import World

from ee_tuning import config as job
from ee_tuning.config import Config
from ee_tuning.data import splits
from ee_tuning.errors import InputError
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.command import tune_within

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STEADY = {"lr_decay_style": "constant", "lr_warmup_fraction": 0.0}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a tokenizer, chats.jsonl, texts/"""
    folder = tmp_path_factory.mktemp("corpora")
    random_llama(folder / "model", vocab_size=257, eos_token_id=256, bos_token_id=256)
    write_byte_tokenizer(folder / "model")
    (folder / "template").write_text(TEMPLATE)
    chats = [
        [{"role": "user", "content": f"What is {n} times {n}?"}, {"role": "assistant", "content": f"It is {n * n}."}]
        for n in range(20)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (folder / "texts").mkdir()
    for number in range(7):
        (folder / "texts" / f"{number}.txt").write_text(f"{number} is a number. " * (number + 1))
    return folder


def data_job(corpora: Path, run: Path, cache: Path, *, tp: int = 1, pp: int = 1, **data: Any) -> Config:
    config = configure(corpora / "model", run, tp=tp, pp=pp, save_interval=2, eval_iters=1000, eval_interval=4)
    return job.replace(
        config,
        exits={"output": "tied", "init": "copy"},
        data={
            "paths": ("1", str(corpora / "texts"), "2", str(corpora / "chats.jsonl")),
            "chat_template": str(corpora / "template"),
            "valid_fraction": 0.3,
            "cache": str(cache),
            "reset_attention_mask": True,
            "reset_position_ids": True,
            "eod_mask_loss": True,
            **data,
        },
    )


def tune(config: Config) -> int:
    """How often this rank tokenized."""
    calls: list[int] = []
    tokenize_files = splits.tokenize_files

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return tokenize_files(*arguments)

    splits.tokenize_files = counted
    try:
        tune_within(config, init_parallel(config.parallel))
    finally:
        splits.tokenize_files = tokenize_files
    return len(calls)


@pytest.fixture(scope="module")
def alone(corpora: Path) -> Config:
    """A run in one process."""
    config = job.replace(data_job(corpora, corpora / "alone", corpora / "cache"), tuning=STEADY)
    assert tune(config) == 2
    return config


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_every_layout_learns_the_same_from_a_blend(
    world: World, corpora: Path, alone: Config, tmp_path: Path, tp: int, pp: int
) -> None:
    """A stage whose documents begin elsewhere, a mask that one rank does not have, or has for its part of the sequence;
    a corpus in another order; each rank tokenizing.
    """
    layout = job.replace(
        data_job(corpora, tmp_path / "layout", tmp_path / "cache", tp=tp, pp=pp),
        tuning=STEADY,
        parallel={"sequence_parallel": True},
    )
    assert world.run(tune, layout) == [2, 0, 0, 0]
    assert_same_records(records(layout), records(alone))


def test_documents_see_each_other_unless_told_apart(corpora: Path, alone: Config, tmp_path: Path) -> None:
    """A rule that is read from the config and asked by nobody; tokens made anew for it."""
    plain = job.replace(alone, data={"reset_attention_mask": False}, tuning={"run_folder": str(tmp_path / "run")})
    assert tune(plain) == 0 and records(plain) != records(alone)


def test_a_blend_goes_on_under_other_replicas(world: World, corpora: Path, alone: Config, tmp_path: Path) -> None:
    """Samples that come twice or never when four replicas become one."""
    parts = job.replace(alone, tuning={"run_folder": str(tmp_path / "parts")})
    world.run(tune, job.replace(parts, tuning={"train_iters": 2}))
    tune(job.replace(parts, tuning={"allow_config_change": True}, data={"cache": str(tmp_path / "other cache")}))
    got, wanted = checkpoint(parts, 4), checkpoint(alone, 4)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-6, atol=1e-8, msg=name)
    weights = ("1", str(corpora / "texts"), "3", str(corpora / "chats.jsonl"))
    other = job.replace(parts, tuning={"allow_config_change": True}, data={"paths": weights})
    with pytest.raises(InputError, match="must keep its blend"):
        tune(other)


def tune_on_two_machines(config: Config, caches: list[str]) -> int:
    """As `tune`, ranks 2 and 3 on a machine with a disk of its own."""
    with mock.patch("socket.gethostname", return_value=f"machine {int(os.environ['RANK']) // 2}"):
        return tune(job.replace(config, data={"cache": caches[int(os.environ["RANK"]) // 2]}))


def test_each_machine_tokenizes_once(world: World, corpora: Path, tmp_path: Path) -> None:
    """Ranks that wait for files on another machine's disk; or every rank of a machine that tokenizes."""
    config = data_job(corpora, tmp_path / "run", tmp_path)
    assert world.run(tune_on_two_machines, config, [str(tmp_path / "own"), str(tmp_path / "other")]) == [2, 0, 2, 0]
    again = job.replace(config, tuning={"run_folder": str(tmp_path / "again")})
    assert world.run(tune_on_two_machines, again, [str(tmp_path / "own")] * 2) == [0, 0, 0, 0]
    third = job.replace(config, tuning={"run_folder": str(tmp_path / "third")})
    assert world.run(tune_on_two_machines, third, [str(tmp_path / "shared")] * 2) == [2, 0, 0, 0]


def refusal(config: Config) -> str:
    try:
        tune(config)
    except InputError as error:
        return str(error)
    return "none"


def test_a_document_that_can_not_be_used_ends_every_rank(world: World, corpora: Path, tmp_path: Path) -> None:
    """The rank that tokenizes ends, and the others wait for it until a collective times out."""
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    config = data_job(corpora, tmp_path / "run", tmp_path / "cache", paths=(str(tmp_path / "latin.txt"),))
    complaints = world.run(refusal, config)
    assert len(set(complaints)) == 1 and "must be UTF-8" in complaints[0] and not os.path.exists(tmp_path / "run")


def test_a_step_without_a_token_to_learn_from_changes_nothing(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss divided by zero tokens that poisons the heads, or that passes without a word."""
    monkeypatch.setattr(splits, "learned_windows", lambda *_: None)  # else no sample is without a token to learn
    (tmp_path / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": "x" * 20}, {"role": "assistant", "content": "y" * 3}]})
            + "\n"
            for _ in range(2)
        )
    )
    config = data_job(
        corpora, tmp_path / "run", tmp_path / "cache", paths=(str(tmp_path / "prompts.jsonl"),), valid_fraction=0.0
    )
    config = job.replace(config, tuning={"global_batch_size": 1, "eval_iters": 0, "save_interval": 1, "train_iters": 7})
    tune(config)
    train = [record for record in records(config) if record["kind"] == "train"]
    empty = [record["step"] for record in train if record["loss"]["2"] is None]
    assert 0 < len(empty) < 7 and all(record["grad_norm"]["2"] is not None for record in train)
    assert [record["step"] for record in train if record["skipped"]] == empty
    for step in (step for step in empty if step > 1):
        before, after = checkpoint(config, step - 1), checkpoint(config, step)
        assert all(torch.equal(before[name], after[name]) for name in before)
