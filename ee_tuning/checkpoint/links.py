"""Links in a model's folder: which are followed.

A file's name in an index, a manifest or a description is the name of a file of the same folder: whoever wrote it may
not point elsewhere. A link is what the file system's owner arranged (Hugging Face's cache, weights in a store, a disk
that was added): it is followed, wherever it leads, where the user, the folder's owner or root made it. Anybody else's,
in a folder that many may write to, is not.
"""

import os
from pathlib import Path

from ee_tuning.errors import InputError

_MOST_LINKS = 40
"""The most links that are followed one after the other, as in the kernel."""


def check_links(folder: Path, path: Path) -> None:
    """Raises InputError where a link on the way from `folder` to `path`, a file in it, is another's, or leads
    nowhere.
    """
    owners = _trusted_owners(folder)
    for step in [
        *reversed([parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]),
        path,
    ]:
        _check_chain(folder, step, owners)


def dangling_link(path: Path) -> str | None:
    """What to say of `path` where it is a link to nothing; None where it is none."""
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
        except (OSError, ValueError) as error:  # a name that no file can have
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
