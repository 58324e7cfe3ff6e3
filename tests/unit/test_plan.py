"""A plan says what a job takes; its arithmetic is checked against a second way to the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from llama_70b import config_only

from ee_tuning import cli
from ee_tuning.parallel.topology import destroy_parallel

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_world() -> None:
    if dist.is_initialized():  # of another test
        destroy_parallel()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 70B in width, eight layers deep."""
    return config_only(tmp_path_factory.mktemp("llama"), num_hidden_layers=8)


def plan(model: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(
        ["plan", "--model", str(model), "--exit-layers", "4", "8", "--train-iters", "100", *flags, "--json"]
    )
    return code, json.loads(capsys.readouterr().out)


def test_time_follows_from_the_operations_counted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours that are wrong by a factor of two are found when the queue's time limit strikes."""
    code, told = plan(
        model,
        capsys,
        "--init",
        "copy",
        "--tensor-model-parallel-size",
        "2",
        "--pipeline-model-parallel-size",
        "2",
        "--gpus-per-node",
        "8",
        "--gpu",
        "a100",
        "--efficiency",
        "0.4",
    )
    assert code == 0 and (told["tensor"], told["pipeline"], told["data"], told["world_size"]) == (2, 2, 2, 8)
    mlp, output = 3 * 8192 * 28672, 32000 * 8192
    layer, tokens = 2 * 8192 * 8192 + 2 * 8192 * 1024 + mlp, 4 * 2048
    flops = (
        2 * tokens / 2 * (4 * (layer + 2048 * 8192) + 3 * (mlp + output) - mlp * 2 / 3)
    )  # four layers and one `mlp` exit, on one of two
    sums = (
        (2 * 4 + 2) * tokens * 8192 * 2
    )  # two a layer, two for the exit; all-reduced among two: each sends half, twice
    stage = flops / (0.4 * 312e12) + sums / 300e9
    last = told["stages"][-1]
    assert last["micro_batch"] == pytest.approx(stage, rel=0.01)
    head = (mlp + output + 8192) / 2
    update = (
        2 * 12 * head / 2 / 2039e9 + (2 + 4) * head / 2 / 300e9
    )  # gathered as bfloat16, reduced as float32, among two
    assert last["update"] == pytest.approx(update, rel=0.01)
    slowest = max(each["micro_batch"] for each in told["stages"])
    assert told["step_seconds"] == pytest.approx(
        2 * slowest + max(each["update"] for each in told["stages"])
    )  # two micro-batches a step
    assert told["tokens"] == 100 * 16 * 2048 and told["tokens_per_second"] == pytest.approx(
        16 * 2048 / told["step_seconds"]
    )
    validations = 2 * 8 * max(each["validation"] for each in told["stages"])
    assert told["hours"] * 3600 == pytest.approx(100 * told["step_seconds"] + validations + slowest)
    assert told["gpu_hours"] == pytest.approx(8 * told["hours"])


def test_a_fit_before_the_first_step_is_counted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that fits while it tunes and not while it fits: all layers are there then, and the sums of every exit."""
    flags = (
        "--architecture",
        "norm",
        "--exit-output",
        "tied",
        "--pipeline-model-parallel-size",
        "2",
        "--gpus-per-node",
        "2",
        "--set",
        "tuning.micro_batch_size=1",
    )
    _, copied = plan(model, capsys, *flags, "--init", "copy")
    _, told = plan(model, capsys, *flags, "--fit-tokens", "819200")
    _, asked = plan(model, capsys, *flags, "--init", "fitted", "--fit-tokens", "819200")
    assert asked["fit_bytes"] == told["fit_bytes"], "tune fits where nothing else is said"
    layer, sums = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672, 8 * 8193 * (2 * 8192 + 1)
    assert (copied["fit_bytes"], copied["fit_seconds"]) == (0, 0)
    assert 2 * 4 * layer + 2 * sums < told["fit_bytes"] < 2 * 5 * layer + 4 * sums
    flops = 819200 * (2 * 4 * (layer + 2048 * 8192 / 2) + 2 * 2 * 8193 * (2 * 8192 + 1))
    assert told["fit_seconds"] == pytest.approx(flops / (0.5 * 989e12), rel=0.1)
    cli.main(["tune", "--model", str(model), "--exit-layers", "4", "--dry-run"])
    assert "fitting exits, stage 0: rank 0, layers 1..8" in capsys.readouterr().out


def test_replicas_share_the_optimizer_and_a_card_too_small_is_said(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan that says yes to what ends out of memory, or no to what fits, is worse than none."""
    flags = ("--tensor-model-parallel-size", "2", "--global-batch-size", "32")
    code, one = plan(model, capsys, *flags, "--gpus-per-node", "2")
    _, four = plan(model, capsys, *flags, "--gpus-per-node", "8")
    (alone,), (shared,) = one["stages"], four["stages"]
    assert shared["memory"]["optimizer"] == pytest.approx(alone["memory"]["optimizer"] / 4, rel=1e-3)
    assert shared["memory"]["weights"] == alone["memory"]["weights"]
    assert code == 0 and one["fits"] and alone["total_bytes"] == sum(alone["memory"].values())
    size = alone["total_bytes"] / 1e9
    for memory, fits in ((size + 2.01, True), (size + 1.99, False)):
        code, told = plan(model, capsys, *flags, "--gpus-per-node", "2", "--gpu-memory", str(memory))
        assert (code == 0) == told["fits"] == told["stages"][0]["fits"] == fits


def test_the_table_shows_every_stage_and_the_formula(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A figure without its formula can not be argued with."""
    assert (
        cli.main(
            (
                f"plan --model {model} --exit-layers 2 8 --pipeline-model-parallel-size 4 --nodes 2 --gpus-per-node 2"
            ).split()
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "pipeline 4 × data 1" in shown and "efficiency (assumed)" in shown and "micro-batch of stage p = " in shown
    rows = [line.split() for line in shown.splitlines()[3:6]]
    assert [row[:3] for row in rows] == [["0", "1-2", "2"], ["1-2", "3-6", "none"], ["3", "7-8", "8"]]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--gpu", "h900"), "--gpu must be one of h100"),
        (("--efficiency", "0"), "--efficiency is a share"),
        (("--nodes", "0"), "at least 1"),
        (("--gpu-memory", "-1"), "must be above 0"),
        (("--gpus-per-node", "3", "--tensor-model-parallel-size", "2"), "multiple of tensor"),
    ],
)
def test_what_makes_no_sense_is_refused(
    model: Path, flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A negative bandwidth gives negative hours."""
    assert cli.main(["plan", "--model", str(model), "--exit-layers", "4", *flags]) == 2
    assert says in capsys.readouterr().err


def test_what_waits_for_the_teacher_is_counted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Distillation lets the backbone run ahead; the first stages keep the most, and run out of memory first."""
    flags = (
        "--pipeline-model-parallel-size",
        "4",
        "--gpus-per-node",
        "4",
        "--loss",
        "forward_kl",
        "--micro-batch-size",
        "1",
        "--architecture",
        "norm",
        "--set",
        "exits.exit_layers=1,3,5,8",
    )
    _, told = plan(model, capsys, *flags)
    kept = 2048 * 8192 * 2  # what one `norm` exit keeps of a micro-batch
    queues = [each["memory"]["queue"] / kept for each in told["stages"]]
    assert len(queues) == 4 and queues == sorted(queues, reverse=True) and queues[0] >= 3 and queues[-1] == 0, queues


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with fewer positions than sequences are long by default."""
    return config_only(
        tmp_path_factory.mktemp("short"),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=128,
    )


def test_defaults_fit_each_other(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan --model M --exit-layers 2,3` that fails by what nobody asked for: eight replicas, sequences longer than the
    model.
    """
    assert cli.main(["plan", "--model", str(short), "--exit-layers", "2,3"]) == 0
    told = capsys.readouterr().out
    assert (
        "tensor 1 × pipeline 1 × data 1, sequences of 128," in told and "number of GPUs: 1, the fewest that fit" in told
    )


def test_the_fewest_gpus_that_fit_are_found(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small batch refused because eight GPUs are supposed; or more GPUs than share the optimizer's state usefully."""
    layout = ("--tensor-model-parallel-size", "2", "--global-batch-size", "32")
    _, one = plan(model, capsys, *layout, "--nodes", "1", "--gpus-per-node", "2")
    memory = one["stages"][0]["memory"]
    between = (
        sum(memory.values()) - memory["optimizer"] / 3
    ) / 1e9 + 2  # too little for one replica, enough where two share
    code, two = plan(model, capsys, *layout, "--gpu-memory", str(between))
    assert code == 0 and two["fits"] and (two["tensor"], two["data"], two["world_size"]) == (2, 2, 4)
    without_optimizer = (sum(memory.values()) - memory["optimizer"]) / 1e9
    code, never = plan(model, capsys, *layout, "--gpu-memory", str(without_optimizer))
    assert code == 1 and not never["fits"] and never["world_size"] == 2, "no number of replicas would help"


def test_the_flags_of_tune_are_taken_and_unused_ones_named(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command line of tune, tried as a plan, refused for its --data; or taken as if the data had been looked at."""
    flags = ["--data", "corpus.jsonl", "--lr", "1e-3", "--output", "runs/x", "--train-iters", "10"]
    assert cli.main(["plan", "--model", str(short), "--exit-layers", "2", *flags]) == 0
    assert "plan does not use data.paths, tuning.run_folder, tuning.lr: " in capsys.readouterr().err


def test_a_batch_that_the_cluster_does_not_divide_names_the_cluster(
    short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "2 × 8 replicas" that nobody asked for, and no word of --gpus-per-node."""
    assert (
        cli.main(["plan", "--model", str(short), "--exit-layers", "2", "--nodes", "1", "--micro-batch-size", "2"]) == 0
    )
    assert (
        cli.main(["plan", "--model", str(short), "--exit-layers", "2", "--nodes", "1", "--micro-batch-size", "4"]) == 2
    )
    assert (
        "as 8 GPUs make 8 replicas, got 16; change one of them, give other --nodes and --gpus-per-node"
        in capsys.readouterr().err
    )
    assert cli.main(["plan", "--model", str(short), "--exit-layers", "2", "--micro-batch-size", "3"]) == 2
    assert capsys.readouterr().err.endswith("replicas = 3 × 1, got 16; change one of them\n"), "neither flag is given"


def test_a_job_that_was_refused_leaves_no_world_behind(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A notebook in which `plan` after a refused `tune` ends in an AssertionError about the world that is there."""
    job = ["--model", str(short), "--exit-layers", "2"]
    assert cli.main(["tune", *job, "--data", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "run")]) == 2
    assert not dist.is_initialized() and "must hold model.safetensors" in capsys.readouterr().err
    assert cli.main(["plan", *job]) == 0


def layouts(model: Path, capsys: pytest.CaptureFixture[str], file: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    heads = ["--exit-layers", "4", "--architecture", "norm", "--init", "copy", "--exit-output", "tied"]
    code = cli.main(["plan", "--model", str(model), *heads, "--train-iters", "100", "--cluster", str(file), *flags])
    shown = capsys.readouterr().out
    return code, json.loads(shown) if "--json" in flags else shown


def test_a_cluster_gets_the_fastest_layout_that_fits(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layout that is not the fastest, or does not fit; one that is passed over without a reason."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("gpu: a100\nnodes: 2\ngpus_per_node: 2\nmemory: 8.5\nlink: 3\nefficiency: 0.4\n")
    code, told = layouts(model, capsys, cluster, "--json")
    found = {(each["tensor"], each["pipeline"], each["data"]): each for each in told["layouts"]}
    assert set(found) == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1)}  # tensor parallelism stays in a node
    assert "frozen layers alone take 7 GB" in found[1, 1, 4]["refusal"]
    fitting = [each for each in told["layouts"] if each["fits"]]
    chosen, plan_of_it = told["chosen"], told["chosen"]["plan"]
    assert (
        code == 0
        and len(fitting) == 3
        and not found[1, 2, 2]["fits"]
        and chosen["hours"] == min(each["hours"] for each in fitting)
    )
    assert chosen["tensor"] == 1  # at 3 GB/s between the GPUs of a node
    assert (plan_of_it["pipeline"], plan_of_it["data"]) == (chosen["pipeline"], chosen["data"])
    sizes = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    code, shown = layouts(model, capsys, cluster, *sizes)
    assert code == 0 and "chosen: tensor 2 × pipeline 2 × data 1\n  the only layout that fits" in shown
    room = found[2, 1, 2]["bytes"] / 1e9 - 0.01
    cluster.write_text(f"gpu: a100\ngpus_per_node: 2\nmemory: {room + 2:.3f}\n")
    code, shown = layouts(model, capsys, cluster, "--tensor-model-parallel-size", "2")
    assert code == 1 and "none fits; nearest is tensor 2 × pipeline 1 × data 1" in shown


@pytest.mark.parametrize(
    ("text", "flags", "says"),
    [
        ("gpu: h100\n", (), "must say gpus_per_node"),
        ("gpu: h100\ngpus_per_node: 8\ngpus: 3\n", (), "unknown key gpus"),
        ("gpu: h100\ngpus_per_node: 0\n", (), "gpus_per_node of"),
        ("gpu: h100\ngpus_per_node: 8\nlink: fast\n", (), "must be a number above 0, got 'fast'"),
        ("gpu: h900\ngpus_per_node: 8\n", (), "must be one of h100"),
        ("gpu: h100\ngpu: h200\ngpus_per_node: 8\n", (), "stands in it twice"),
        ("- 1\n", (), "must hold keys with values"),
        ("gpu: h100\ngpus_per_node: 8\n", ("--nodes", "2"), "--nodes is of the cluster"),
        ("gpu: h100\ngpus_per_node: 1\nmemory: 3\n", (), "no layout of 1 GPUs suits this job"),
        ("gpu: h100\ngpus_per_node: 1000000000000000\n", (), "must be a number in 1..100000"),
        ("gpu: h100\ngpus_per_node: 8\nlink: .inf\n", (), "must be a number above 0"),
        ("gpu: h100\ngpus_per_node: 2\n", ("--tensor-model-parallel-size", "0"), "at least 1, got 0"),
        ("gpu: h100\ngpus_per_node: 2\n", ("--tensor-model-parallel-size", "3"), "no layout of 2 GPUs has tensor"),
    ],
)
def test_what_is_no_cluster_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, flags: tuple[str, ...], says: str
) -> None:
    """A misspelt figure that is ignored, and a cluster rented by the plan of another."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(text)
    code = cli.main(["plan", "--model", str(model), "--exit-layers", "4", "--cluster", str(cluster), *flags])
    assert code == 2 and says in capsys.readouterr().err
