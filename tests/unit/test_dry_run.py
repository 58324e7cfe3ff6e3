"""A dry run meets what a true run would meet, at any size, and its account of memory is that of the true tensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from llama_70b import config_only
from random_models import random_model
from torch.distributed.tensor import DTensor

from ee_tuning import cli
from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.config import Config, load_config
from ee_tuning.data.tokens import PackedSamples, Splits
from ee_tuning.errors import InputError
from ee_tuning.model.exit_head import ExitMLP
from ee_tuning.parallel.relay import NextAction
from ee_tuning.parallel.topology import destroy_parallel, init_parallel
from ee_tuning.planning import dry_run
from ee_tuning.planning.dry_run import RankProfile, profile_ranks
from ee_tuning.tuning.microbatch_schedule import MicrobatchSchedule
from ee_tuning.tuning.stage_forward import StageForward
from ee_tuning.tuning.tuner import Tuner

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_world() -> Iterator[None]:
    if dist.is_initialized():  # of another test
        destroy_parallel()
    yield
    if dist.is_initialized():
        destroy_parallel()


def job(model: Path, tp: int = 1, pp: int = 1, **keys: Any) -> Config:
    dotted = {key.replace("__", "."): value for key, value in keys.items()}
    return load_config(
        None,
        {
            "model.path": str(model),
            "parallel.tensor_model_parallel_size": tp,
            "parallel.pipeline_model_parallel_size": pp,
            **dotted,
        },
    )


def test_70b_on_128_ranks_is_rehearsed_from_its_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run that needs the weights, or a process per rank, is of no use on a laptop."""
    model, profiles = config_only(tmp_path / "70b"), list[RankProfile]()
    monkeypatch.setattr(dry_run, "profile_ranks", lambda *job: profiles.extend(profile_ranks(*job)) or profiles)
    assert (
        cli.main(
            (
                f"tune --model {model} --exit-layers 10,20,30,40,50,60,70,80 --init copy --tensor-model-parallel-size 8 "
                "--pipeline-model-parallel-size 8 --dry-run --world-size 128"
            ).split()
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert (
        "tensor 8 × pipeline 8 × data 2" in printed
        and "stages 1, 2, 3, 4, 5, 6: rank 16, layers 11..20, exits after 20" in printed
    )
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    head = 3 * 8192 * 28672 + 32000 * 8192 + 8192
    first, middle, last = profiles
    for each in (first, middle, last):
        memory = each.memory
        embedding = 32000 * 8192 * 2 / 8 if each is first else 0
        assert memory["weights"] == pytest.approx(10 * layer * 2 / 8 + embedding, rel=1e-3)
        assert memory["optimizer"] == pytest.approx(3 * 4 * head / 8 / 2, rel=1e-3)
        assert memory["heads"] == pytest.approx(2 * head / 8, rel=1e-3)
        assert memory["gradients"] == pytest.approx(4 * head / 8, rel=1e-3)
    assert (first.stages, middle.stages, last.stages) == ((0,), (1, 2, 3, 4, 5, 6), (7,))
    # A matrix product of n × m by m × k is 2 n m k operations; a head goes forward once and backward twice; causal
    # attention is half.
    tokens, heads = 4 * 2048, 64 / 8
    attention = 10 * 4 * heads * 4 * 2048 * 2048 * 128 / 2
    assert first.layer_flops == pytest.approx(2 * 10 * layer / 8 * tokens + attention, rel=1e-3)
    mlp, output = 3 * 8192 * 28672 / 8, 32000 * 8192 / 8
    assert first.head_flops == pytest.approx(
        3 * 2 * tokens * (mlp + output) - 2 * tokens * mlp * 2 / 3, rel=1e-3
    )  # normed input: frozen
    assert first.pp_bytes == 2048 * 4 * 8192 * 2 and last.pp_bytes == 0
    # Per layer two sums; of the head one forward (its MLP) and one backward (the gradient of what enters the output
    # matrix).
    states = 2048 * 4 * 8192 * 2
    assert first.tp_bytes == pytest.approx(
        2 * (10 * 2 + 1 + 1 + 1) * states, rel=1e-2
    )  # and one of the embedding; both ways


def test_a_sequence_in_parts_is_accounted_for_in_parts(tmp_path: Path) -> None:
    """A plan that promises what the run does not save, or a micro-batch that leaves the fake world with another
    shape.
    """
    model = config_only(tmp_path / "70b", num_hidden_layers=20)
    keys = {"exits__exit_layers": [10, 20], "tuning__loss": "forward_kl", "tuning__eval_iters": 0}
    (whole, _), (cut, _) = (
        profile_ranks(job(model, 8, 2, parallel__sequence_parallel=cuts, **keys), 16) for cuts in (False, True)
    )
    assert cut.pp_bytes == whole.pp_bytes / 8 == 2048 * 4 * 8192 * 2 / 8
    assert cut.memory["queue"] == whole.memory["queue"] / 8 > 0 and cut.memory["weights"] == whole.memory["weights"]
    assert cut.memory["activations"] < whole.memory["activations"] and cut.layer_flops == whole.layer_flops
    # Beside what sums did: a gather before the output matrix, for what stood whole there is in parts; and the
    # teacher's.
    assert cut.tp_bytes == pytest.approx(whole.tp_bytes, rel=0.1)
    with pytest.raises(InputError, match=r"8 equal parts, but tuning\.seq_length is 2044; set it to a multiple of 8"):
        profile_ranks(job(model, 8, 2, parallel__sequence_parallel=True, tuning__seq_length=2044, **keys), 16)


def test_a_long_sequence_in_chunks_is_accounted_for_in_chunks(tmp_path: Path) -> None:
    """A plan that counts the layers' results of a whole sequence, forgets the keys and values of earlier chunks, or
    takes a chunk's operations and messages for the micro-batch's.
    """
    model = config_only(tmp_path / "70b", num_hidden_layers=4, max_position_embeddings=16384)
    keys = {"tuning__seq_length": 16384, "tuning__micro_batch_size": 1, "tuning__global_batch_size": 1}
    keys |= {"exits__exit_layers": [2, 4], "parallel__sequence_parallel": True, "tuning__eval_iters": 0}
    (whole, _), (chunked, _) = (
        profile_ranks(job(model, 8, 2, tuning__forward_chunk_length=length, **keys), 16) for length in (16384, 0)
    )
    assert chunked.layer_flops == pytest.approx(whole.layer_flops, rel=1e-6) and chunked.pp_bytes == whole.pp_bytes
    assert chunked.head_flops == pytest.approx(whole.head_flops, rel=1e-6)
    kept = 2 * 2 * 16384 * 128 * 2  # keys and values of two layers, one head of eight on each rank, 16 bits
    before, after = whole.memory["activations"], chunked.memory["activations"]
    assert kept < after < kept + before / 2, "a quarter of the sequence at a time"
    keys |= {"exits__architecture": ["norm", "layer"], "exits__init": "copy"}
    (attending,) = profile_ranks(job(model, 8, 1, **keys), 8)
    assert attending.memory["queue"] == 16384 * 8192 * 2 // 8, "the rows that a `layer` head waits for, in parts"


@pytest.mark.parametrize(
    ("family", "architecture", "output", "exits"),
    [
        ("llama", "mlp", "untied", [2, 6]),
        ("qwen2", "norm,embedding", "untied", [3, 4]),
        ("gpt2", "layer", "untied", [4]),
        ("qwen3", "adapter,layer", "tied", [1, 2]),
    ],
)
def test_the_account_is_of_the_true_tensors(
    family: str, architecture: str, output: str, exits: list[int], tmp_path: Path
) -> None:
    """An estimate beside the code goes wrong with the next change of the code."""
    random_model(family, tmp_path / "model")
    config = job(
        tmp_path / "model",
        model__dtype="bfloat16",
        exits__exit_layers=exits,
        exits__architecture=architecture,
        exits__init="copy",
        exits__output=output,
        tuning__seq_length=8,
        tuning__micro_batch_size=1,
        tuning__global_batch_size=2,
    )
    (profile,) = profile_ranks(config, 1)
    topology = init_parallel(config.parallel)
    loaded = load_for_tuning(config, topology)
    samples = PackedSamples(torch.zeros(9, dtype=torch.int32).numpy(), 8)
    tuner = Tuner(loaded, Splits(train=samples, valid=None), config, topology)
    assert profile.memory["weights"] == sum(
        each.nbytes for each in [*loaded.model.backbone.parameters(), loaded.model.backbone.angles]
    )
    masters = [parameter for each in tuner.exits for parameter in each.parameters.values()]
    moments = [
        moment
        for each in tuner.exits
        for state in each.adam.state.values()
        for moment in (state["exp_avg"], state["exp_avg_sq"])
    ]
    held = [each.to_local() for each in (*masters, *moments) if isinstance(each, DTensor)]
    assert len(held) == 3 * len(masters)
    counts = 4 * len(masters)  # Adam's own counts of its steps
    assert profile.memory["optimizer"] == sum(each.nbytes for each in held) + counts
    destroy_parallel()


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_what_training_the_model_keeps_is_counted(trainable: str, tmp_path: Path) -> None:
    """A plan of the heads alone, for a run whose layers have gradients, masters, moments and kept activations."""
    random_model("llama", tmp_path / "model", hidden_size=64, intermediate_size=256, head_dim=16)
    keys = {"exits__exit_layers": [2, 4], "exits__output": "shared", "tuning__trainable": trainable}
    keys |= {"tuning__seq_length": 64, "tuning__micro_batch_size": 2, "tuning__global_batch_size": 4}
    config = job(tmp_path / "model", model__dtype="float32", tuning__eval_iters=0, **keys)
    (profile,) = profile_ranks(config, 1)
    topology = init_parallel(config.parallel)
    samples = Splits(train=PackedSamples(torch.zeros(65, dtype=torch.int32).numpy(), 64), valid=None)
    tuner = Tuner(load_for_tuning(config, topology), samples, config, topology)
    assert tuner.backbone is not None
    masters = sum(each.nbytes for each in tuner.backbone.optimizer._masters.values())
    assert profile.memory["optimizer"] == 3 * masters
    assert profile.memory["gradients"] == pytest.approx(masters, rel=0.02)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    microbatch = next(MicrobatchSchedule(tuner._source, [], config.tuning).training(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = StageForward(tuner._model, tuner._relay(), topology).forward(microbatch, NextAction.END)
    weights = {each.untyped_storage().data_ptr() for each in tuner._model.parameters()}
    assert output.ends is not None
    held = sum(size for place, size in kept.items() if place not in weights)
    assert profile.memory["activations"] == pytest.approx(held, rel=0.05)
    destroy_parallel()


def test_a_wrong_shape_is_found_and_its_rank_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run through a copy of the code would find its own mistakes, and not the tuner's."""
    model = config_only(tmp_path / "small", num_hidden_layers=4)
    monkeypatch.setattr(ExitMLP, "forward", lambda self, x: self.fc2(x))  # as if the first matrix had been forgotten
    with pytest.raises(RuntimeError) as caught:
        profile_ranks(job(model, 2, 2, exits__exit_layers=[4]), 8)
    assert any("rank 4 of 8, stage 1 of 2" in note for note in caught.value.__notes__)


def test_ranks_with_padding_alone_and_uneven_replicas_pass(tmp_path: Path) -> None:
    """A vocabulary and a width that do not divide are where layouts break."""
    model = config_only(
        tmp_path / "odd",
        num_hidden_layers=3,
        hidden_size=96,
        intermediate_size=192,
        num_attention_heads=8,
        vocab_size=33,
    )
    profiles = profile_ranks(
        job(
            model,
            8,
            3,
            exits__exit_layers=[1, 3],
            exits__init="copy",
            exits__output="tied",
            tuning__seq_length=4,
            tuning__micro_batch_size=1,
            tuning__global_batch_size=10,
        ),
        8 * 3 * 5,
    )
    assert [each.exits for each in profiles] == [((1,),), ((),), ((3,),)]
    bare, trained = profiles[1].memory, profiles[0].memory
    assert not (bare["optimizer"] or bare["heads"] or bare["gradients"]), "a stage without exits trains nothing"
    # Of five replicas the first holds the most rows: of the norm (96), of fc1 (48 × 96 here) and of fc2 (96 × 24 here).
    assert trained["optimizer"] == 3 * 4 * (20 + 10 * 96 + 20 * 24) + 3 * 4


@pytest.mark.parametrize(
    ("changes", "keys", "world", "says"),
    [
        ({}, {"exits__exit_layers": [81]}, 1, "exit_layers must lie in 1..80"),
        ({}, {"exits__exit_layers": [8], "pp": 2}, 3, "multiple of tensor × pipeline"),
        ({}, {"exits__exit_layers": [8], "tp": 16}, 16, "tensor_model_parallel_size must divide"),
        ({}, {"exits__exit_layers": [1], "pp": 2}, 2, "each pipeline stage must get a layer"),
        ({}, {"exits__exit_layers": [8]}, 3, "global_batch_size must be a multiple"),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
            {"exits__exit_layers": [8], "exits__architecture": "mlp"},
            1,
            "experts",
        ),
        ({}, {"exits__exit_layers": [8], "tuning__seq_length": 100000}, 1, r"tuning\.seq_length must lie in 1\.\.4096"),
        (
            {},
            {"exits__exit_layers": [8], "data__valid_fraction": 3.0},
            1,
            r"data\.valid_fraction must be at least 0 and below 1",
        ),
        ({}, {"exits__exit_layers": [8], "data__valid_fraction": 0.0}, 1, "validation needs held-out data"),
        ({"model_type": "mamba"}, {"exits__exit_layers": [8]}, 1, "model_type must be one of"),
    ],
)
def test_what_a_true_run_refuses_a_dry_run_refuses(
    changes: dict[str, Any], keys: dict[str, Any], world: int, says: str, tmp_path: Path
) -> None:
    """A dry run that passes what the cluster will refuse has cost a place in its queue."""
    with pytest.raises(InputError, match=says):
        profile_ranks(job(config_only(tmp_path / "model", **changes), **keys), world)


def test_weights_that_are_there_are_held_against_the_config(tmp_path: Path) -> None:
    """A config.json beside another model's weights would be found on the cluster alone."""
    random_model("llama", tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**raw, "intermediate_size": 96}))
    with pytest.raises(InputError, match="must have shape"):
        profile_ranks(job(tmp_path / "model", exits__exit_layers=[2], tuning__seq_length=32), 4)


def test_a_size_to_imagine_is_for_dry_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """`tune --world-size 8` would tune in one process and look as if it were eight."""
    assert cli.main(["tune", "--model", "somewhere", "--world-size", "8"]) == 2
    assert "--dry-run" in capsys.readouterr().err


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 512,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "vocab_size": 1000,
}


@pytest.mark.parametrize("cuts_sequence", [False, True])
def test_experts_are_counted_all_in_memory_and_the_chosen_in_time(cuts_sequence: bool, tmp_path: Path) -> None:
    """A plan by the dense model's formula holds one expert of eight, or computes eight of two."""
    model = config_only(tmp_path / "mixtral", **MIXTRAL)
    keys = {
        "exits__exit_layers": [2, 4],
        "exits__architecture": ["norm", "layer"],
        "tuning__seq_length": 64,
        "tuning__micro_batch_size": 3,
        "tuning__global_batch_size": 6,
        "parallel__sequence_parallel": cuts_sequence,
    }
    first, last = profile_ranks(job(model, 2, 2, **keys, parallel__pipeline_layout=[2, 2]), 8)
    expert, attention, router = 3 * 512 * 896, 2 * 512 * 512 + 2 * 512 * 128, 8 * 512
    layer = (attention + 8 * expert) / 2 + router + 2 * 512
    assert last.memory["weights"] == 2 * 2 * layer + 64 * 64 * 4, "two layers in bfloat16, rotations in float32"
    tokens = 3 * 64
    routed = router / 2 if cuts_sequence else router  # each rank routes its part of the tokens, or all of them
    per_layer = 2 * tokens * ((attention + 2 * expert) / 2 + routed) + 4 * 4 * 3 * 64 * 64 * 64 / 2
    assert first.layer_flops == last.layer_flops == pytest.approx(2 * per_layer, rel=1e-6)
    output = 2 * tokens * 512 * 500
    assert last.validation_flops == pytest.approx(per_layer + output, rel=1e-6)
    assert last.head_flops == pytest.approx(
        3 * (per_layer + output), rel=0.03
    )  # attention's backward is 5 products to its forward's 2
    assert last.memory["optimizer"] == pytest.approx(3 * 4 * (layer + 512 * 500 + 512) / 2, rel=1e-3)


def test_documents_that_share_a_row_cost_what_the_kernel_for_them_does(tmp_path: Path) -> None:
    """Rules for documents that a plan leaves out, or a masked attention that is counted whole and holds its mask."""
    model = config_only(
        tmp_path / "llama",
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=1000,
    )
    keys = {
        "exits__exit_layers": [1, 2],
        "exits__architecture": ["norm", "layer"],
        "tuning__seq_length": 1024,
        "tuning__micro_batch_size": 2,
        "tuning__global_batch_size": 2,
        "tuning__loss_chunk_tokens": 256,
    }
    rules = {"data__reset_attention_mask": True, "data__reset_position_ids": True, "data__eod_mask_loss": True}
    mask = 2 * 1024 * 1024  # bytes
    (plain,), (told_apart,) = (profile_ranks(job(model, **keys, **more), 1) for more in ({}, rules))
    assert (told_apart.layer_flops, told_apart.head_flops) == (plain.layer_flops, plain.head_flops), (
        "at most: documents as long as rows"
    )
    assert told_apart.memory["activations"] < plain.memory["activations"] + mask
    (plain,), (masked,) = (profile_ranks(job(model, model__dtype="float32", **keys, **more), 1) for more in ({}, rules))
    assert masked.memory["activations"] > plain.memory["activations"] + mask, "the kernel wants 16 bits"
    assert masked.layer_flops == pytest.approx(plain.layer_flops + 2 * 4 * 2 * 2 * 1024 * 1024 * 64 / 2), (
        "all of every block is computed"
    )


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({"tuning__loss": ["forward_kl"]}, [((1,),), ((4,),), ((),)]),
        (
            {
                "tuning__loss": ["cross_entropy=0.5", "total_variation=0.5"],
                "tuning__teacher": "hidden",
                "parallel__sequence_parallel": True,
            },
            [((1,),), ((4,),), ((),)],
        ),
        ({"tuning__compare_final": True, "exits__output": "tied"}, [((1,),), ((4,),), ((),)]),
    ],
)
def test_lessons_of_the_final_head_are_rehearsed(keys: dict[str, Any], kinds: list[Any], tmp_path: Path) -> None:
    """A dry run that leaves the teacher out passes jobs that lack memory for the layers past the last exit, or for what
    waits.
    """
    model = config_only(
        tmp_path / "llama",
        hidden_size=512,
        intermediate_size=896,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    sizes = {
        "tuning__seq_length": 64,
        "tuning__micro_batch_size": 2,
        "tuning__global_batch_size": 12,
        "exits__architecture": ["norm"],
        "exits__exit_layers": [1, 4],
        "parallel__pipeline_layout": [2, 2, 2],
    }
    stages = profile_ranks(job(model, 2, 3, **sizes, **keys), 12)
    assert [each.exits for each in stages] == kinds and [each.layers for each in stages] == [
        ((1, 2),),
        ((3, 4),),
        ((5, 6),),
    ]
    states = 64 * 2 * 512 * 2  # hidden states of a micro-batch
    own = states // 2 if keys.get("parallel__sequence_parallel") else states
    # A `norm` exit keeps the states it takes of the micro-batch at hand and each that the backbone is ahead: pipeline -
    # 1 - stage.
    queues = [each.memory["queue"] // own for each in stages]
    assert queues == [3, 2, 0] if "tuning__loss" in keys else queues[0] and queues[1] and not queues[2]
    output = (
        1000 * 512 * 2 // 2
    )  # the model's own output matrix: on the last stage, and where it is the exits', or turns told states
    layers = 2 * 2 * (512 * 512 * 2 + 512 * 128 * 2 + 3 * 512 * 896) // 2
    is_shared = keys.get("tuning__teacher") == "hidden" or keys.get("exits__output") == "tied"
    for each, held in zip(stages, (1 + is_shared, is_shared, 1), strict=True):
        assert each.memory["weights"] == pytest.approx(layers + held * output, rel=0.01), (
            "the first has the word embedding besides"
        )
    bare, taught = (
        profile_ranks(job(model, 2, 3, **{**sizes, "parallel__pipeline_layout": []}, **each), 12) for each in ({}, keys)
    )
    assert max(each.layers[-1][1] for each in bare) == 4 and max(each.layers[-1][1] for each in taught) == 6


def test_states_that_a_drafting_head_reads_are_counted_on_their_way(tmp_path: Path) -> None:
    """A plan without what travels beside the hidden states, or with a state that travels twice."""
    model = config_only(tmp_path / "70b", num_hidden_layers=40)
    keys = {"exits__architecture": ["eagle3"], "tuning__loss": ["lk"], "parallel__pipeline_layout": [10, 10, 10, 10]}
    ranks = profile_ranks(job(model, 8, 4, tuning__micro_batch_size=1, **keys), 32)
    states = 2048 * 8192 * 2
    # Layers 2, 20 and 37 are read; what comes from layer 20 is what the third stage begins with.
    assert [(each.stages, each.pp_bytes) for each in ranks] == [
        ((0,), 2 * states),
        ((1,), 2 * states),
        ((2,), 3 * states),
        ((3,), 0),
    ]
    assert [each.exits for each in ranks] == [((),), ((),), ((),), ((40,),)]
    layer = 2 * 8192 * 64 * 128 * 2 + 2 * 2 * 8192 * 8 * 128 - 8192 * 64 * 128 + 3 * 8192 * 28672
    head = (layer + 32000 * 8192) / 8 + 3 * 8192 * 8192
    assert ranks[-1].memory["optimizer"] == pytest.approx(3 * 4 * head, rel=1e-3)
