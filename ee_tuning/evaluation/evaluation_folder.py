"""The output folder of an evaluation: measured results, which survive any interruption, and the reports made from them.

`readings.jsonl` begins with the job's settings. Each process that measures adds a line about its machine, and a line
for each completely measured block of prompts. The same command continues after the last complete block.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_tuning.differences import differences_text
from ee_tuning.errors import InputError
from ee_tuning.evaluation.readings import ItemResult
from ee_tuning.json_file import parse_json, to_json
from ee_tuning.storage.apart import check_folder_writable
from ee_tuning.storage.appended_file import AppendedFile
from ee_tuning.storage.atomic_write import os_errors_as_input_errors

READINGS, FIGURES, PAGE, OWNER = "readings.jsonl", "evaluation.json", "index.html", ".owner"
_REMEDY = "give another --output, or --overwrite to start over"
_BEGINNING = b'{"job": '

Settings = dict[str, Any]
"""Everything that the figures depend on."""


def check_folder(folder: Path, overwrites: bool) -> None:
    """Raises InputError where `folder` can not be written, or holds no evaluation. Changes nothing."""
    check_folder_writable(folder)
    journal = folder / READINGS
    if not folder.is_dir() or (journal.exists() and overwrites):
        return
    others = [path.name for path in folder.iterdir() if path.name != OWNER]
    if others and not journal.exists():
        raise InputError(
            f"--output must be a new folder or that of an evaluation, and {folder} holds {others[0]}; give another --output"
        )
    if journal.exists():
        _first_line_of(journal)  # raises where it is none


def settings_in(folder: Path) -> Settings:
    """Returns the settings of the job whose results are in `folder`; empty without any."""
    return (_first_line_of(folder / READINGS) or {}) if (folder / READINGS).exists() else {}


class EvaluationFolder:
    """The results of one job, in one process, within `owned`."""

    def __init__(self, folder: Path, settings: Settings, overwrites: bool, session: Mapping[str, Any]):
        """Reads the job's former results; `session` describes this process's machine.

        Raises InputError where they are another job's, or damaged.
        """
        self.path = folder / READINGS
        self.blocks: dict[int, list[ItemResult]] = {}
        """Number of a block -> its results."""
        self.sessions: list[dict[str, Any]] = []
        """The machine of each process that measured."""
        self.settings, self._session = parse_json(to_json(settings).encode()), dict(session)
        self._file: AppendedFile | None = None
        self._end = 0
        if self.path.exists() and not overwrites:
            self._read()

    def keep(self, block: int, readings: list[ItemResult]) -> None:
        """Stores a block. Raises InputError where the disk refuses."""
        with os_errors_as_input_errors(self.path, "make room; the same command continues after the stored blocks"):
            file = self._file = self._file or self._begun()
            file.append(_line({"block": block, "readings": [reading.tree() for reading in readings]}))
        self.blocks[block] = readings

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begun(self) -> AppendedFile:
        file = AppendedFile(self.path, self._end)
        if not self._end:
            for report in (FIGURES, PAGE):  # reports of an evaluation that this one replaces
                (self.path.parent / report).unlink(missing_ok=True)
            file.append(_line({"job": self.settings}))
        file.append(_line({"session": self._session}))
        self.sessions.append(self._session)
        return file

    def _read(self) -> None:
        there = _first_line_of(self.path)
        if there is None:
            return
        self._check_same(there)
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    tree = parse_json(line)
                    if "session" in tree:
                        self.sessions.append(tree["session"])
                    elif number > 1:
                        self.blocks[tree["block"]] = [ItemResult.of_tree(each) for each in tree["readings"]]
                except (ValueError, KeyError, TypeError, InputError) as error:
                    raise InputError(f"line {number} of {self.path} is damaged; {_REMEDY}") from error
                self._end += len(line)

    def _check_same(self, there: Settings) -> None:
        if differences := differences_text(there, self.settings):
            raise InputError(
                f"{self.path.parent} holds an evaluation of another job, which differs in {differences}; to go on give that job, "
                f"else {_REMEDY}"
            )


def _first_line_of(journal: Path) -> Settings | None:
    """Returns the settings in the first line, or None where a kill cut it off. Raises InputError on anything else."""
    try:
        with journal.open("rb") as file:
            line = file.readline()
    except OSError as error:
        raise InputError(f"{journal}, which is there, can not be read: {error.strerror}; {_REMEDY}") from error
    if not line.endswith(b"\n") and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:
        return None
    try:
        tree = parse_json(line)
    except ValueError:
        tree = None
    job = tree.get("job") if isinstance(tree, dict) else None
    if not isinstance(job, dict):
        raise InputError(f"{journal} was not written by `ee-tuning evaluate`; {_REMEDY}")
    return job


def _line(tree: Any) -> bytes:
    return (to_json(tree, ensure_ascii=False) + "\n").encode()
