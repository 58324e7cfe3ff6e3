"""Each family is cut over tensor parallelism, one with experts over stages too, without a change: decoding, tuning, and
the artifact that tuning writes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoding import decode
from exits import write_exits
from random_models import FAMILIES, WITH_EXPERTS, random_model
from safetensors.torch import load_file
from torch.testing import assert_close

from ee_tuning import config as job
from ee_tuning.artifact.load import load_for_generation, load_for_tuning
from ee_tuning.config import Config, ParallelSection, load_config
from ee_tuning.data.tokens import PackedSamples, Splits
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.tuner import Tuner

BIASED = "llama with attention_bias"
CUT = [family for family in FAMILIES if family != "mistral"]
"""Mistral has Llama's tensors, which are cut alike."""
LAYOUTS = [
    *((family, 2, 1) for family in (*CUT, BIASED)),
    *((family, tp, 2) for family in WITH_EXPERTS for tp in (1, 2)),
]
Decoded = list[tuple[list[int], list[tuple[int, float]]]]


def model_of(family: str, folder: Path, **changes: Any) -> Any:
    return random_model(family.split()[0], folder, **changes, **({"attention_bias": True} if family == BIASED else {}))


def decode_at(model: str, exits: str, tp: int, pp: int) -> Decoded:
    """Per prompt the tokens, and the exit layer and confidence of each."""
    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    loaded = load_for_generation(
        load_config(None, {"model.path": model, "exits.path": exits, "model.dtype": "float64"}), topology
    )
    answers = decode(loaded, [[5, 17, 80, 3, 9], [41]], 10, engine={"max_pending": 4}, threshold=0.5)
    return [
        (said.tokens, [(layer, round(c, 9)) for layer, c in zip(said.exit_layers, said.confidences, strict=True)])
        for said in answers
    ]


def tune(config: Config) -> None:
    """On random tokens, in the world that exists; the artifact goes to the run folder."""
    topology = init_parallel(config.parallel)
    folder, length = Path(config.tuning.run_folder), config.tuning.seq_length
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.random.RandomState(5).randint(0, 101, 23 * length + 1).astype(np.int32)
    samples = Splits(train=PackedSamples(tokens, length), valid=PackedSamples(tokens[: 3 * length + 1], length))
    tuner = Tuner(load_for_tuning(config, topology), samples, config, topology)
    if config.tuning.resume:
        tuner.resume()
    tuner.run()
    tuner.save_exit_heads(folder / "exit_heads")


def job_of(model: Path, run: Path, architecture: str = "mlp", **tuning: Any) -> Config:
    settings = {
        "train_iters": 3,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "seq_length": 12,
        "lr": 1e-2,
        "eval_iters": 1,
        "save_interval": 0,
        "clip_grad": 0.5,
        "lr_decay_style": "constant",
        "lr_warmup_fraction": 0.0,
    }
    return job.replace(
        Config(),
        model={"path": str(model), "dtype": "float64"},
        exits={"exit_layers": (2, 5), "architecture": architecture},
        tuning={"run_folder": str(run), **settings, **tuning},
    )


@pytest.mark.parametrize(("family", "tp", "pp"), LAYOUTS)
def test_more_ranks_decode_what_one_decodes(world, tmp_path, family, tp, pp):
    """A bias added once a rank, a norm's weight cut, a fused or transposed matrix cut along the wrong side; an expert's
    part summed twice over.
    """
    model_of(family, tmp_path / "model", confident=True)
    exits = write_exits(
        tmp_path / "model",
        tmp_path / "exits",
        init="copy",
        architecture=["layer", "norm" if family in WITH_EXPERTS else "mlp"],
    )
    wanted = decode_at(str(tmp_path / "model"), str(exits), 1, 1)
    for answer in world.run(decode_at, str(tmp_path / "model"), str(exits), tp, pp):
        assert answer == wanted


@pytest.mark.parametrize(
    ("family", "architecture", "pp", "cuts_sequence"),
    [
        *((family, "mlp", 1, False) for family in CUT if family not in WITH_EXPERTS),
        ("gpt2", "embedding", 1, True),
        ("gpt2", "layer", 1, False),
        ("gpt2", "layer", 2, True),
        ("gpt2", "mlp", 1, True),
        ("qwen2", "layer", 1, False),
        ("gpt2", "adapter", 1, False),
        ("mixtral", "norm", 2, False),
        ("mixtral", "layer", 1, False),
        ("qwen3_moe", "layer", 2, False),
        ("mixtral", "layer", 2, True),
        (BIASED, "layer", 1, True),
    ],
)
def test_a_run_begun_by_one_rank_ends_by_more_as_it_does_by_one(
    world, tmp_path, family, architecture, pp, cuts_sequence
):
    """A bias's gradient summed over ranks that have it alike, or not summed over ranks with other tokens, a router's
    that is a rank's share; learned positions counted from each part's beginning; an artifact or a checkpoint with a
    matrix the wrong way round.
    """
    model_of(family, tmp_path / "model")
    straight, begun = (job_of(tmp_path / "model", tmp_path / run, architecture) for run in ("straight", "run"))
    tune(straight)
    tune(job.replace(begun, tuning={"train_iters": 2}))
    first = load_file(tmp_path / "run" / "exit_heads" / "exit_heads.safetensors")
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": pp, "sequence_parallel": cuts_sequence}
    world.run(tune, job.replace(begun, tuning={"resume": True}, parallel=layout))
    wanted, got = (load_file(tmp_path / run / "exit_heads" / "exit_heads.safetensors") for run in ("straight", "run"))
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert_close(got[name], tensor, rtol=0, atol=1e-6, msg=name)
        assert (got[name] - first[name]).abs().max() > 1e-3, f"{name} is not trained"
