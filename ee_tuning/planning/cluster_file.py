"""`ee-tuning plan --cluster FILE`: the machines that a job is to be laid out on."""

import dataclasses
from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.planning.gpus import gpu
from ee_tuning.planning.plan import EFFICIENCY, MOST_TRIED, Cluster
from ee_tuning.yaml_file import parse_yaml


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ClusterKeys:
    """The keys of the file. Those of figures replace the data sheet's."""

    gpu: str
    nodes: int = 1
    gpus_per_node: int
    memory: float | None = None
    """GB of a GPU."""
    tflops: float | None = None
    bandwidth: float | None = None
    """GB/s of a GPU's memory."""
    link: float | None = None
    """GB/s from a GPU to others of its node, in one direction."""
    network: float | None = None
    """GB/s from a GPU to other nodes, in one direction."""
    efficiency: float = EFFICIENCY


_FIGURES = ("memory", "tflops", "bandwidth", "link", "network")


def read_cluster(path: Path) -> Cluster:
    """Reads the YAML file. Raises InputError on invalid YAML, unknown or missing keys, and unusable values."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--cluster must be a YAML file, and {path} is not: {reason}; name another") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold keys with values, such as `gpu: h100`, got {tree!r:.60}")
    known = [field.name for field in dataclasses.fields(_ClusterKeys)]
    if unknown := [str(key) for key in tree if key not in known]:
        raise InputError(f"{path} has the unknown key {unknown[0]}; keys of a cluster are {', '.join(known)}")
    if missing := [key for key in ("gpu", "gpus_per_node") if key not in tree]:
        raise InputError(f"{path} must say {missing[0]}, and does not; add it")
    for key, value in tree.items():
        _check(path, key, value)
    keys = _ClusterKeys(**tree)
    return Cluster(
        gpu=gpu(keys.gpu, **{name: getattr(keys, name) for name in _FIGURES}),
        nodes=keys.nodes,
        gpus_per_node=keys.gpus_per_node,
        efficiency=keys.efficiency,
    )


def _check(path: Path, key: str, value: Any) -> None:
    if key == "gpu":
        fits, rule = isinstance(value, str), "a name"
    elif key in ("nodes", "gpus_per_node"):
        fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TRIED
        rule = f"a number in 1..{MOST_TRIED}"
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        rule = "a number above 0"
    if not fits:
        raise InputError(f"{key} of {path} must be {rule}, got {value!r:.40}")
