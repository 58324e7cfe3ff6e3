"""Records of a run in TensorBoard, if it is installed, and in Weights & Biases, if tuning.wandb_project is set."""

import importlib.util
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.questions import no_questions
from ee_tuning.storage.atomic_write import atomic_file
from ee_tuning.training_log.metrics import MetricsRecord

WANDB_ID = "wandb_id"


def check_dashboards(config: Config) -> None:
    """Raises InputError where the package of a requested dashboard is missing."""
    if config.tuning.wandb_project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"tuning.wandb_project needs the package wandb, which is not installed, got {config.tuning.wandb_project}; "
            "install it (pip install wandb), or leave the key out"
        )


@contextmanager
def tensorboard(folder: Path, step: int) -> Iterator[list[Callable[[MetricsRecord], None]]]:
    """Yields sinks that write records to event files in `folder`/tensorboard, none without TensorBoard.

    Former events after `step` are dropped.
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
    """Yields sinks that send records to the project tuning.wandb_project, none where it is not set.

    Raises InputError where the package can not start a run without asking for an account's key.
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
    except Exception as error:  # its exception classes differ from version to version
        raise InputError(
            f"tuning.wandb_project = {project} can not be reached: {' '.join(str(error).split())[:200]}; give a key (wandb "
            "login), set WANDB_MODE=offline, or leave the key out"
        ) from error
    try:
        yield [lambda record: run.log({**scalars(record), "step": record["step"]})]
    finally:
        run.finish()


def _run_id(folder: Path) -> str:
    """Returns the run's id for Weights & Biases, which is stored in the folder. A resumed run keeps its id."""
    path = folder / WANDB_ID
    if not path.exists():
        with atomic_file(path) as partial:
            partial.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def scalars(record: MetricsRecord) -> dict[str, float]:
    """Returns the numbers of a record under names such as `validation/loss/exit 8` and `train/lr`."""
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
