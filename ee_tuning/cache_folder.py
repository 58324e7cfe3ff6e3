"""The folder that keeps what later processes would otherwise make again: token ids of data, built kernels.

$EE_TUNING_CACHE where it is set, else `.cache/ee_tuning` in the home folder. A container often runs as a user that has
no home, or one that can not be written: a folder beside the machine's other temporary files then serves, and a warning
says so once.
"""

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

VARIABLE = "EE_TUNING_CACHE"
_PROBE_BYTES = 1 << 16
"""A full disk still makes empty files."""

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder, which may not exist yet where $EE_TUNING_CACHE names it; every process of a user on a machine gets
    the same.
    """
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else _default_folder()


@functools.cache
def _default_folder() -> Path:
    try:
        folder = Path.home() / ".cache" / "ee_tuning"
        check_writable(folder)
        return folder
    except RuntimeError:  # Path.home found none
        reason = "this user has no home folder"
    except OSError as error:
        reason = f"{folder} can not be written ({error.strerror})"
    fallback = _temporary_folder()
    log.warning(
        "%s: token ids and kernels are kept in %s, which may not last; set %s to a folder that does",
        reason,
        fallback,
        VARIABLE,
    )
    return fallback


def check_writable(folder: Path) -> None:
    """Makes the folder where it is missing, and writes and removes a small file. Raises OSError where that fails, on a
    full disk too.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="probe-") as probe:
        probe.write(bytes(_PROBE_BYTES))
        probe.flush()


def is_private(folder: Path) -> bool:
    """Whether the folder is this user's own and only this user may write to it: what lies there may be run as code."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _temporary_folder() -> Path:
    """`ee_tuning-UID` among the temporary files; a new folder of this process where another user has taken that
    name.
    """
    folder = Path(tempfile.gettempdir()) / f"ee_tuning-{os.getuid()}"
    try:
        check_writable(folder)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="ee_tuning-"))
    return folder if is_private(folder) else Path(tempfile.mkdtemp(prefix="ee_tuning-"))
