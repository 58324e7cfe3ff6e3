"""The examples pass a dry run at the size of their scripts, fit the GPUs that they name, and agree with each other."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ee_tuning.config import Config, load_config, replace
from ee_tuning.model_config.config import read_model_config
from ee_tuning.parallel.topology import destroy_parallel
from ee_tuning.planning.gpus import gpu
from ee_tuning.planning.plan import Cluster, TuningPlan, make_plan

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.parent for path in ROOT.glob("examples/*/job.yaml"))
BODY = ROOT / "examples" / "run_under_slurm.sh"
MLP = {"exit_layers": (32,), "architecture": ("mlp",), "output": "untied"}

SLURM = {
    "srun": """while [[ $1 == --* ]]; do echo "$1" >> "$TOLD/srun"; shift; done
highest=0
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@"; code=$?; (( code > highest )) && highest=$code; done
exit $highest""",
    "scontrol": 'if [[ $1 == show ]]; then echo "SlurmdTimeout           = 600 sec"; else echo "$@" >> "$TOLD/scontrol"; fi',
    "python": 'echo "$SLURM_PROCID $*" >> "$TOLD/python"; exit $((SLURM_PROCID ? LAST : 0))',
}
"""Slurm's commands as far as the scripts need them, on two processes, and a `python` that tells what it was asked."""


def job(folder: Path) -> Config:
    """The example's job, with the shape that lies in its folder in place of the model."""
    return load_config(folder / "job.yaml", {"model.path": str(folder)})


def plan_of(config: Config, nodes: int, gpus_per_node: int = 8, name: str = "h100") -> TuningPlan:
    if dist.is_initialized():  # of another test
        destroy_parallel()
    return make_plan(config, Cluster(gpu=gpu(name), nodes=nodes, gpus_per_node=gpus_per_node, efficiency=0.5))


@cache
def plan_of_example(folder: Path) -> TuningPlan:
    """The example's plan on the nodes that its script asks for."""
    return plan_of(job(folder), number(r"^#SBATCH --nodes=(\d+)$", (folder / "slurm.sh").read_text()))


def number(pattern: str, script: str) -> int:
    (found,) = re.findall(pattern, script, flags=re.MULTILINE)
    return int(found)


def test_the_promised_models_are_there() -> None:
    """A glob that finds nothing passes every test of its files."""
    assert [path.name for path in EXAMPLES] == [
        "llama-2-13b",
        "llama-2-70b",
        "llama-2-7b",
        "llama-3.1-70b",
        "llama-3.1-8b",
        "qwen2.5-7b",
    ]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_scripts_and_job_name_the_same_things(folder: Path) -> None:
    """A script that starts another example's job, or on other GPUs than it asks for; a job whose run another example
    has.
    """
    config, where = load_config(folder / "job.yaml"), f"examples/{folder.name}/job.yaml"
    torchrun, slurm = ((folder / name).read_text() for name in ("torchrun.sh", "slurm.sh"))
    for script in (folder / "torchrun.sh", folder / "slurm.sh", BODY):
        subprocess.run(["bash", "-n", script], check=True)
    assert f"-m ee_tuning tune {where}" in torchrun and f"{BODY.relative_to(ROOT)} {where} " in slurm
    assert "SIGUSR1" in torchrun, "torchrun would be killed by it and orphan its workers"
    assert "#SBATCH --signal=USR1@300" in slurm and not re.search("^[^#]*torchrun", BODY.read_text(), re.MULTILINE), (
        "torchrun makes every exit code 1"
    )
    assert config.tuning.run_folder == f"runs/{folder.name}"
    assert config.tuning.stop_exit_code == number(r"\$code -eq (\d+)", BODY.read_text())
    nodes = number(r"^#SBATCH --nodes=(\d+)$", slurm)
    assert number(r"^#SBATCH --ntasks-per-node=(\d+)$", slurm) == number(r"^#SBATCH --gpus-per-node=(\d+)$", slurm) == 8
    assert number(r"--nproc-per-node (\d+)", torchrun) == 8
    assert nodes == (number(r"--nnodes (\d+)", torchrun) if "--nnodes" in torchrun else 1)
    layers, exits = read_model_config(folder).num_layers, config.exits.layers(80)
    assert len(exits) == 8 and exits == tuple(round(layers * i / 8 - 1e-9) for i in range(1, 9)), (
        "every eighth of the depth"
    )


@pytest.mark.parametrize(("last", "comes_again"), [(75, True), (0, False), (1, False), (137, False)])
def test_a_job_comes_again_where_its_run_says_so(tmp_path: Path, last: int, comes_again: bool) -> None:
    """One that was told another run folder and never comes again, or for ever; one that failed and fails again; flags
    that get lost.
    """
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TOLD": str(tmp_path / "told"),
        "LAST": str(last),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    (tmp_path / "told").mkdir()
    flags = ["--output", "else where"]
    done = subprocess.run(["bash", ROOT / "examples/llama-2-7b/slurm.sh", *flags], env=environment, cwd=ROOT)
    told = {path.name: path.read_text().splitlines() for path in (tmp_path / "told").iterdir()}
    asked = f"-m ee_tuning tune examples/llama-2-7b/job.yaml {' '.join(flags)}"
    assert done.returncode == last and told["python"] == [f"0 {asked}", f"1 {asked}"]
    assert "--wait=720" in told["srun"], (
        "a node that died is missed after SlurmdTimeout, and the job must live until then"
    )
    assert told.get("scontrol") == (["requeue 17"] if comes_again else None)


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_examples_run_dry_and_fit(folder: Path) -> None:
    """An example that breaks by shape, or ends out of memory, is found on a cluster after a day in its queue."""
    plan = plan_of_example(folder)
    assert plan.fits and plan.tokens == 40000 * 16 * 2048
    assert max(each.idle_share for each in plan.stages) < 0.15, "layers are split so that no stage waits long"


@pytest.mark.parametrize(
    ("exits", "weights"), [({}, "int8"), (MLP, "int8"), (MLP, "nf4")], ids=["adapters-int8", "mlp-int8", "mlp-nf4"]
)
def test_7b_fits_a_card_of_24_gb(exits: dict[str, Any], weights: str) -> None:
    """Weights counted in 16 bits, or heads that are not counted: the card's owner has no second one."""
    config = load_config(ROOT / "examples/llama-2-7b/card-24gb.yaml", {"model.path": str(ROOT / "examples/llama-2-7b")})
    assert config.tuning.backbone_weights == "int8" and len(config.exits.layers(32)) == 8
    config = replace(config, exits=exits, tuning={"backbone_weights": weights})
    plan = plan_of(config, 1, 1, "rtx4090")
    (stage,) = plan.stages
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    held = {"int8": 1 + 4 / 4096 * 0.8, "nf4": 0.5 + 4 / 64}[
        weights
    ] * matrices  # int8: a scale for 4096 or 11008 weights
    outside = 32000 * 4096 * 2 * (1 + (not exits))  # word embedding; tied exits have the output matrix there
    assert stage.memory["weights"] == pytest.approx(held + outside, rel=2e-3)
    assert plan.fits and stage.layers == ((1, 32),) and stage.total_bytes < 16e9


def test_70b_with_eight_exits_fits_a_node_of_eight_gpus_of_80_gb() -> None:
    """What the design promises: about 17 GB of weights and 17 GB of head state per GPU."""
    (stage,) = plan_of_example(ROOT / "examples/llama-2-70b").stages
    state = sum(stage.memory[kind] for kind in ("optimizer", "heads", "gradients"))
    assert stage.memory["weights"] / 1e9 == pytest.approx(17.2, abs=0.1) and state / 1e9 == pytest.approx(17.4, abs=0.1)
    assert stage.fits and stage.total_bytes < 45e9
