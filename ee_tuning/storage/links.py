"""Symbolic links in a model's folder, and which of them are followed.

A file name in an index, a manifest or a description refers to a file of the same folder; its author must not point
elsewhere. A link is different: the file system's owner made it (Hugging Face's cache, a weight store, an added disk).
It is followed if the user, the folder's owner or root made it, and not if anybody else did, in a folder that many may
write to.
"""

import os
from pathlib import Path

from ee_tuning.errors import InputError

_MOST_LINKS = 40
"""Most links that are followed in a row, as in the kernel."""


def check_links(folder: Path, path: Path) -> None:
    """Raises InputError where a link between `folder` and the file `path` in it is broken or of an untrusted owner."""
    owners = _trusted_owners(folder)
    for step in [
        *reversed([parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]),
        path,
    ]:
        _check_chain(folder, step, owners)


def dangling_link(path: Path) -> str | None:
    """Returns a message where `path` is a broken link, else None."""
    try:
        if not path.is_symlink() or path.exists():
            return None
        return f"{path} is a link to {os.readlink(path)}, which is not there; fetch the file that it stands for, or mend the link"
    except (OSError, ValueError, RuntimeError):
        return None


def _check_chain(folder: Path, link: Path, owners: set[int]) -> None:
    first = link
    for _ in range(_MOST_LINKS):
        try:
            if not link.is_symlink():
                break
            owner = link.lstat().st_uid
            target = link.parent / os.readlink(link)
        except (OSError, ValueError) as error:  # an impossible file name
            raise InputError(f"{first} can not be followed: {error}") from error
        if owner not in owners:
            raise InputError(
                f"{link} is a link of another user (uid {owner}) to {target}, and only links of yours, of root's or of the "
                f"owner of {folder} are followed; make the link yourself, or put the file itself into the folder"
            )
        link = target
    else:
        raise InputError(f"{first} is a link that leads back to itself; put the file itself into the folder")
    if reason := dangling_link(first):
        raise InputError(reason)


def _trusted_owners(folder: Path) -> set[int]:
    return {0, os.getuid(), folder.stat().st_uid}
