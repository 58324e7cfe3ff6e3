"""The examples pass a dry run at the size of their scripts, fit the GPUs that they name, and agree with each other."""
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ee_tuning.config import Config, load_config, replace
from ee_tuning.model.config import read_model_config
from ee_tuning.parallel.topology import leave_parallel
from ee_tuning.planning.gpus import gpu
from ee_tuning.planning.plan import Cluster, Plan, make_plan

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.parent for path in ROOT.glob("examples/*/job.yaml"))


def job(folder: Path) -> Config:
    """The example's job, with the shape that lies in its folder in place of the model."""
    return load_config(folder / "job.yaml", {"model.path": str(folder)})


def plan_of(folder: Path, nodes: int, gpus_per_node: int = 8, name: str = "h100", config: Config | None = None) -> Plan:
    if dist.is_initialized():  # of another test
        leave_parallel()
    return make_plan(config or job(folder), Cluster(gpu=gpu(name), nodes=nodes, gpus_per_node=gpus_per_node, efficiency=0.5))


def number(pattern: str, script: str) -> int:
    (found,) = re.findall(pattern, script, flags=re.MULTILINE)
    return int(found)


def test_the_promised_models_are_there() -> None:
    """A glob that finds nothing passes every test of its files."""
    assert [path.name for path in EXAMPLES] == ["llama-2-13b", "llama-2-70b", "llama-2-7b", "llama-3.1-70b", "llama-3.1-8b", "qwen2.5-7b"]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_scripts_and_job_name_the_same_things(folder: Path) -> None:
    """A script that starts another example's job, or looks for its run in another folder, requeues for ever."""
    config, where = load_config(folder / "job.yaml"), f"examples/{folder.name}/job.yaml"
    torchrun, slurm = ((folder / name).read_text() for name in ("torchrun.sh", "slurm.sh"))
    for script in ("torchrun.sh", "slurm.sh"):
        subprocess.run(["bash", "-n", folder / script], check=True)
        assert f"-m ee_tuning tune {where}" in (folder / script).read_text()
        assert "SIGUSR1" in (folder / script).read_text(), "torchrun would be killed by it and orphan its workers"
    assert re.findall(r"^run=(.*)$", slurm, flags=re.MULTILINE) == [config.tuning.run_folder] == [f"runs/{folder.name}"]
    nodes = number(r"^#SBATCH --nodes=(\d+)$", slurm)
    assert number(r"--nproc-per-node (\d+)", slurm) == number(r"^#SBATCH --gpus-per-node=(\d+)$", slurm) == 8
    assert number(r"--nproc-per-node (\d+)", torchrun) == 8
    assert nodes == (number(r"--nnodes (\d+)", torchrun) if "--nnodes" in torchrun else 1)
    layers, exits = read_model_config(folder).num_layers, config.exits.layers(80)
    assert len(exits) == 8 and exits == tuple(round(layers * i / 8 - 1e-9) for i in range(1, 9)), "every eighth of the depth"


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_examples_run_dry_and_fit(folder: Path) -> None:
    """An example that breaks by shape, or ends out of memory, is found on a cluster after a day in its queue."""
    plan = plan_of(folder, number(r"^#SBATCH --nodes=(\d+)$", (folder / "slurm.sh").read_text()))
    assert plan.fits and plan.tokens == 40000 * 16 * 2048
    assert max(each.idle_share for each in plan.stages) < 0.15, "layers are split so that no stage waits long"


@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("exits", [{}, {"exit_layers": (32,), "architecture": ("mlp",), "output": "untied"}], ids=["adapters", "mlp"])
def test_7b_fits_a_card_of_24_gb(exits: dict[str, Any], weights: str) -> None:
    """Weights counted in 16 bits, or heads that are not counted: the card's owner has no second one."""
    config = load_config(ROOT / "examples/llama-2-7b/card-24gb.yaml", {"model.path": str(ROOT / "examples/llama-2-7b")})
    assert config.tuning.backbone_weights == "int8" and len(config.exits.layers(32)) == 8
    config = replace(config, exits=exits, tuning={"backbone_weights": weights})
    plan = plan_of(ROOT / "examples/llama-2-7b", 1, 1, "rtx4090", config)
    (stage,) = plan.stages
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    held = {"int8": 1 + 4 / 4096 * 0.8, "nf4": 0.5 + 4 / 64}[weights] * matrices  # int8: a scale for 4096 or 11008 weights
    outside = 32000 * 4096 * 2 * (1 + (not exits))  # word embedding; tied exits have the output matrix there
    assert stage.memory["weights"] == pytest.approx(held + outside, rel=2e-3)
    assert plan.fits and stage.layers == ((1, 32),) and stage.total_bytes < 16e9


def test_70b_with_eight_exits_fits_a_node_of_eight_gpus_of_80_gb() -> None:
    """What the design promises: about 17 GB of weights and 17 GB of head state per GPU."""
    (stage,) = plan_of(ROOT / "examples/llama-2-70b", 1).stages
    state = sum(stage.memory[kind] for kind in ("optimizer", "heads", "gradients"))
    assert stage.memory["weights"] / 1e9 == pytest.approx(17.2, abs=0.1) and state / 1e9 == pytest.approx(17.4, abs=0.1)
    assert stage.fits and stage.total_bytes < 45e9
