"""sha256 of every file of a folder, verified before any of them is used: safetensors does not detect a flipped byte.

`manifest.json` is {"files": {name: {"sha256", "bytes"}}}. It is written last, so a folder without it is unfinished.
"""

import fnmatch
import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json, to_json
from ee_tuning.parallel.collectives import gather_lists
from ee_tuning.parallel.topology import Topology

MANIFEST = "manifest.json"
TEMPLATES = "additional_chat_templates"
"""The only subfolder: transformers keeps a tokenizer's named chat templates in it."""


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Lists every file that is in `folder` now. `known` holds sha256 sums by file name that are known already."""
    files = {
        name: {"sha256": (known or {}).get(name) or _sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in file_names(folder)
        if name != MANIFEST
    }
    (folder / MANIFEST).write_text(to_json({"files": files}, indent=2) + "\n", encoding="utf-8")


def file_names(folder: Path) -> list[str]:
    """Returns the names of the files in `folder`, and of those in its TEMPLATES with that prefix."""
    templates = folder / TEMPLATES
    within = [f"{TEMPLATES}/{path.name}" for path in sorted(templates.iterdir())] if templates.is_dir() else []
    return sorted(path.name for path in folder.iterdir() if not within or path.name != TEMPLATES) + within


def read_manifest(folder: Path, remedy: str) -> dict[str, dict[str, Any]]:
    """Reads file name -> {"sha256", "bytes"}. Raises InputError, ending with `remedy`, where the manifest is missing or
    invalid.
    """
    path = folder / MANIFEST
    try:
        files = read_json(path)["files"]
        for name, entry in files.items():
            plain = name.removeprefix(f"{TEMPLATES}/")
            if Path(plain).name != plain or plain in ("", "..") or set(entry) != {"sha256", "bytes"}:
                raise ValueError(f"entry {name!r} must be a file of this folder with its sha256 and bytes")
    except OSError as error:
        raise InputError(
            f"the folder must hold its manifest, but {path} can not be read: {error.strerror}; {remedy}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a manifest: {error!r}; {remedy}") from error
    return files


def holds_manifest(folder: Path) -> bool:
    """Whether this project wrote the folder's `manifest.json`, even if it is broken. Other programs use that name,
    too.
    """
    try:
        tree = read_json(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):  # a GGUF file is no folder
        return False
    except (OSError, ValueError):
        return True
    files = tree.get("files") if isinstance(tree, dict) else None
    return isinstance(files, dict) and any(
        isinstance(entry, dict) and entry.keys() & {"sha256", "bytes"} for entry in files.values()
    )


def check_manifest(folder: Path, remedy: str, topology: Topology | None = None) -> None:
    """Raises InputError where a file of the folder differs from its manifest. All ranks share the work and raise
    together.
    """
    with ManifestCheck(folder, remedy, topology) as check:
        check.finish()


class ManifestCheck:
    """Runs `check_manifest` in the background: a thread hashes this rank's share of the files. A context manager.

    Output made from the folder must not be put in place before `finish`.
    """

    def __init__(self, folder: Path, remedy: str, topology: Topology | None = None):
        self._folder, self._remedy, self._topology = folder, remedy, topology
        self._thread, self._is_left = ThreadPoolExecutor(1), threading.Event()
        self._complaints = self._thread.submit(self._complain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_left.set()
        self._thread.shutdown()

    def finish(self) -> None:
        """Waits for the check. Raises InputError, on all ranks, where a file differs from the manifest."""
        if found := gather_lists(self._complaints.result(), self._topology):
            raise InputError(found[0])

    def _complain(self) -> list[str]:
        rank, world = (0, 1) if self._topology is None else (self._topology.rank, self._topology.world_size)
        try:
            for name, entry in sorted(read_manifest(self._folder, self._remedy).items())[rank::world]:
                check_file(self._folder / name, entry, self._remedy, self._is_left)
        except InputError as error:
            return [str(error)]
        return []


def check_file(path: Path, entry: dict[str, Any], remedy: str, is_left: threading.Event | None = None) -> None:
    """Raises InputError, ending with `remedy`, where the file differs from the manifest's `entry`.

    Setting `is_left` makes it return early, without a result.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing, and {MANIFEST} names it; {remedy}")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise InputError(f"{path} must have {entry['bytes']} bytes, as {MANIFEST} says, got {size}; {remedy}")
    digest = _sha256(path, is_left)
    if digest != entry["sha256"] and not (is_left and is_left.is_set()):
        raise InputError(
            f"{path} is altered: its sha256 must be {entry['sha256']}, as {MANIFEST} says, got {digest}; {remedy}"
        )


def check_replaceable(output: Path, overwrite: bool, marks: Sequence[str]) -> None:
    """Raises InputError where `output` exists, is not empty, and may not be replaced.

    It may be replaced if it is an export of the format with files that match all patterns `marks`, and holds only files
    that its manifest lists.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    rule, remedy = "--overwrite replaces an export of the same format only", "give another --output"
    if not overwrite:
        raise InputError(f"{output} exists already; give --overwrite to replace an export, or another --output")
    if not output.is_dir():
        raise InputError(f"{rule}, and {output} is a file; {remedy}")
    listed = read_manifest(output, f"{rule}; {remedy}")
    for mark in marks:
        if not fnmatch.filter(listed, mark):
            raise InputError(f"{rule}, and {output} is none: it holds no {mark}; {remedy}")
    for name in file_names(output):
        if name not in listed and name != MANIFEST:
            raise InputError(
                f"--overwrite would remove {output / name}, which its manifest does not list; move it away first"
            )


def _sha256(path: Path, is_left: threading.Event | None = None) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file, memoryview(buffer) as view:
        while (size := file.readinto(buffer)) and not (is_left and is_left.is_set()):
            digest.update(view[:size])
    return digest.hexdigest()
