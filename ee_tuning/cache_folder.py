"""The cache folder for results that later processes reuse: token ids of data, built kernels.

It is $EE_TUNING_CACHE if set, else `.cache/ee_tuning` in the home folder. A container often runs as a user without a
writable home; the cache is then a folder beside the machine's temporary files, with one warning.
"""

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

VARIABLE = "EE_TUNING_CACHE"
_PROBE_BYTES = 1 << 16
"""Even on a full disk an empty file can be created."""

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Returns the folder, the same for every process of a user on a machine. It may not exist yet if $EE_TUNING_CACHE
    names it.
    """
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else _default_folder()


@functools.cache
def _default_folder() -> Path:
    try:
        folder = Path.home() / ".cache" / "ee_tuning"
        check_writable(folder)
        return folder
    except RuntimeError:  # Path.home failed
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
    """Creates the folder if needed, and writes and removes a small file. Raises OSError where that fails, also on a
    full disk.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="probe-") as probe:
        probe.write(bytes(_PROBE_BYTES))
        probe.flush()


def is_private(folder: Path) -> bool:
    """Whether this user owns the folder and nobody else can write to it: its content may be run as code."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _temporary_folder() -> Path:
    """Returns `ee_tuning-UID` among the temporary files, or a new folder of this process where another user has taken
    that name.
    """
    folder = Path(tempfile.gettempdir()) / f"ee_tuning-{os.getuid()}"
    try:
        check_writable(folder)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="ee_tuning-"))
    return folder if is_private(folder) else Path(tempfile.mkdtemp(prefix="ee_tuning-"))
