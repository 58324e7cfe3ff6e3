"""The commands of `ee-tuning compare` go through at tensor 2 × pipeline 2."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from random_models import random_llama

from ee_tuning import cli
from ee_tuning.comparison import command
from ee_tuning.comparison.job import CompareOptions
from ee_tuning.config import Config, ParallelSection, load_config
from ee_tuning.errors import InputError
from ee_tuning.parallel import topology

TEXT = "".join(f"def f{n}(x):\n    return [x + {n} for x in range({n % 7})] or leave(early={n})\n" for n in range(200))
TINY = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}


def compared_in(folder: str, ways: tuple[str, ...]) -> list[int]:
    """This rank's exit codes: of the comparison's commands, which all ranks run as torchrun's processes would, and on
    rank 0 of the comparison itself.
    """
    codes = list[int]()

    def run(line: list[str], log: Path) -> None:
        assert "torch.distributed.run" in line and line[line.index("--nproc-per-node") + 1] == "4"
        codes.append(cli.main(received(line[line.index("ee_tuning") + 1 :])))
        if codes[-1]:
            raise InputError(f"{log.stem} failed")

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(topology, "destroy_world"))  # the world goes on behind each command
        patches.enter_context(mock.patch.object(command, "launched_rank", return_value=None))
        if topology.init_parallel(ParallelSection()).rank > 0:
            while words := received(None):
                codes.append(cli.main(words))
            return codes
        try:
            codes.append(command.compare(*job_of(folder, ways), run))
        finally:
            received(None)
    return codes


def job_of(folder: str, ways: tuple[str, ...]) -> tuple[Config, CompareOptions]:
    keys = {
        "model.path": f"{folder}/model",
        "data.paths": [f"{folder}/text.txt"],
        "data.cache": f"{folder}/cache",
        "tuning.seq_length": 32,
        "tuning.micro_batch_size": 4,
        "tuning.global_batch_size": 4,
        "generation.max_new_tokens": 3,
        "generation.max_batch_size": 1,
        "parallel.tensor_model_parallel_size": 2,
        "parallel.pipeline_model_parallel_size": 2,
    }
    options = CompareOptions(
        output=Path(folder) / "compared",
        tokens=130,
        ways=ways,
        depths=(0.5,),
        thresholds=(0.1,),
        num_samples=2,
        num_prompts=1,
        repeats=1,
    )
    return load_config(None, keys), options


def received(words: list[str] | None) -> Any:
    """Rank 0's words, on all ranks."""
    told = [words]
    dist.broadcast_object_list(told)
    return told[0]


def test_the_commands_go_through_at_tensor_and_pipeline_parallel_sizes(world: Any, tmp_path: Path):
    """A command that can not take the layout of the others: a night's comparison that ends at it."""
    random_llama(tmp_path / "model", vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END, **TINY)
    write_byte_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    ways = ("exits", "sorted", "healed-kl")
    codes = world.run(compared_in, str(tmp_path), ways)
    assert len(codes[0]) > 2 * len(ways) and codes == [[0] * len(codes[0])] + [[0] * (len(codes[0]) - 1)] * 3
    rows = json.loads((tmp_path / "compared" / "compare.json").read_text())["rows"]
    assert {row["way"] for row in rows} >= set(ways) and all(row["loss"]["value"] for row in rows)
