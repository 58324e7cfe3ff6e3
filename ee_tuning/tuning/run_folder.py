"""The folder of a run. It is checked before anything is loaded, and written only when the run can begin."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ee_tuning.artifact.exit_heads import check_output
from ee_tuning.config import Config, save_config
from ee_tuning.errors import InputError
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.apart import check_apart, check_folder_writable
from ee_tuning.storage.atomic_write import atomic_file, os_errors_as_input_errors
from ee_tuning.storage.owner import owned
from ee_tuning.tuning.resume_check import CONFIG, check_resumable
from ee_tuning.tuning.state import latest_checkpoint
from ee_tuning.tuning.trained_weights import ADAPTER, check_trained_output

EXIT_HEADS = "exit_heads"
"""The tuned artifact, within the folder."""
OWNER = ".owner"
"""The file that names the process which currently tunes into the folder."""


@contextmanager
def owned_run_folder(config: Config, topology: Topology) -> Iterator[None]:
    """Makes this job the only owner of tuning.run_folder while the context is open. All ranks call it.

    Raises InputError where another job owns it. The lock file lies inside, because the folder may be a mounted volume
    whose parent is read-only. A folder that was created only for the lock is removed again.
    """
    folder = Path(config.tuning.run_folder)
    on_first_rank(topology, lambda: _check_place(config, folder))
    with owned(folder, topology, lock_file=folder / OWNER):
        yield


def check_run_folder(config: Config, topology: Topology) -> None:
    """Raises InputError where tuning.run_folder can not hold the run, or the run would replace a foreign artifact."""
    folder = Path(config.tuning.run_folder)

    def check() -> None:
        is_new = latest_checkpoint(folder) is None
        if not is_new and not config.tuning.resume:
            raise InputError(
                f"with --no-resume tuning.run_folder must be new, and {folder} holds the checkpoints of a run; leave "
                "--no-resume out to go on with it, or give another folder"
            )
        if not is_new:
            check_resumable(config, folder)
        with os_errors_as_input_errors(folder):
            # A resumed run has its heads in its checkpoints, so the artifact is its own, written at an earlier end.
            if (
                is_new
                and config.exits.path is not None
                and Path(config.exits.path).resolve() == (folder / EXIT_HEADS).resolve()
            ):
                raise InputError(
                    f"exits.path must lie elsewhere than tuning.run_folder/{EXIT_HEADS}, which the tuned exits become, got "
                    f"{config.exits.path}; choose another tuning.run_folder"
                )
            check_output(folder / EXIT_HEADS, overwrite=True)
            if config.tuning.trained.has_backbone:
                check_trained_output(folder / ADAPTER)

    on_first_rank(topology, check)


def open_run_folder(config: Config, topology: Topology) -> None:
    """Creates the folder if it is missing, and writes the resolved job to config.yaml.

    Raises InputError where the disk refuses.
    """
    folder = Path(config.tuning.run_folder)

    def write() -> None:
        with os_errors_as_input_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / CONFIG) as partial:
            save_config(config, partial)

    on_first_rank(topology, write)


def _check_place(config: Config, folder: Path) -> None:
    data = config.data
    check_apart(folder, (config.model.path, config.exits.path, data.tokenizer), "tuning.run_folder (--output)")
    check_apart(folder, (*data.paths, *data.valid_paths), "tuning.run_folder (--output)", around=True)
    check_folder_writable(folder, "tuning.run_folder")
