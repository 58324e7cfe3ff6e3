"""A run's records in TensorBoard, where it is installed, and in Weights & Biases, where tuning.wandb_project asks for
it.
"""

import importlib.util
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ee_tuning.checkpoint.atomic_write import atomic_file
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.questions import no_questions
from ee_tuning.tuning.metrics import MetricsRecord

WANDB_ID = "wandb_id"


def check_dashboards(config: Config) -> None:
    """Raises InputError where a dashboard is asked for whose package is missing."""
    if config.tuning.wandb_project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"tuning.wandb_project wants the package wandb, which is not installed, got {config.tuning.wandb_project}; "
            "install it (pip install wandb), or leave the key out"
        )


@contextmanager
def tensorboard(folder: Path, step: int) -> Iterator[list[Callable[[MetricsRecord], None]]]:
    """What takes records into event files in `folder`/tensorboard; nothing where it is missing. Events after `step` are
    dropped.
    """
    if importlib.util.find_spec("tensorboard") is None:
        yield []
        return
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def take(record: MetricsRecord) -> None:
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["step"])

    try:
        yield [take]
    finally:
        writer.close()


@contextmanager
def weights_and_biases(config: Config) -> Iterator[list[Callable[[MetricsRecord], None]]]:
    """What takes records into a run of the project tuning.wandb_project; nothing where none is asked for.

    Raises InputError where the package can not begin a run without asking for an account's key.
    """
    project = config.tuning.wandb_project
    if not project:
        yield []
        return
    import dataclasses

    import wandb

    folder = Path(config.tuning.run_folder).absolute()
    try:
        with no_questions():
            run = wandb.init(
                project=project,
                id=_run_id(folder),
                name=folder.name,
                dir=str(folder),
                resume="allow",
                config=dataclasses.asdict(config),
            )
    except Exception as error:  # its classes differ from version to version
        raise InputError(
            f"tuning.wandb_project = {project} can not be reached: {' '.join(str(error).split())[:200]}; give a key (wandb "
            "login), set WANDB_MODE=offline, or leave the key out"
        ) from error
    try:
        yield [lambda record: run.log({**scalars(record), "step": record["step"]})]
    finally:
        run.finish()


def _run_id(folder: Path) -> str:
    """The run's name to Weights & Biases, kept in the folder: what goes on with the folder goes on with the run, and
    nothing else does.
    """
    path = folder / WANDB_ID
    if not path.exists():
        with atomic_file(path) as partial:
            partial.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def scalars(record: MetricsRecord) -> dict[str, float]:
    """The numbers of a record by names such as `validation/loss/exit 8` and `train/lr`."""
    found = {}
    for key, value in record.items():
        if key in ("kind", "step"):
            continue
        if not isinstance(value, dict):
            found[f"{record['kind']}/{key}"] = value
            continue
        what = {"speed_up": "threshold", "idle_share": "stage", "memory_bytes": "stage"}.get(key, "exit")
        found |= {f"{record['kind']}/{key}/{what} {name}": each for name, each in value.items()}
    return {name: float(value) for name, value in found.items() if value is not None}
