"""`--output FILE` of commands that complete prompts: finished records survive an interruption, and FILE appears when it
is complete.

Each completion is appended, as soon as it is finished, to the journal FILE.partial: a first line with the job's
settings, then records in the order in which they were finished. When all are there, FILE is written atomically, in the
prompts' order. The same command continues the journal. The `job` of the records in a complete FILE identifies the
command that wrote them.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ee_tuning.differences import differences_text
from ee_tuning.errors import InputError
from ee_tuning.generation.budget_exit import BudgetExit
from ee_tuning.generation.record import Record
from ee_tuning.json_file import parse_json, to_json
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.appended_file import AppendedFile
from ee_tuning.storage.atomic_write import atomic_file, check_file
from ee_tuning.storage.owner import owned

Settings = dict[str, Any]
"""Everything that completions depend on."""
Key = tuple[int, int]
"""A completion: the place of its prompt, and its number among the prompt's completions."""

BUDGET = "budget"
"""Key of a BudgetExit in records and in the journal's first line. It is no part of the job: tokens depend on the exit
alone.
"""
_REMEDY = "give another --output, or --overwrite to begin anew"


@dataclass(frozen=True)
class Form:
    """The form of a command's records."""

    command: str
    under: str | None = None
    """Key of the object with `prompt_index`, `index` and `job`; None where the record itself has them."""

    def marks(self, record: Record) -> Record:
        """Returns the object with these keys, or an empty one."""
        marks = record if self.under is None else record.get(self.under)
        return marks if isinstance(marks, dict) else {}

    def marked(self, record: Record, job: str) -> Record:
        """Returns `record` with the key `job`."""
        return (
            {**record, "job": job} if self.under is None else {**record, self.under: {**record[self.under], "job": job}}
        )


GENERATED = Form("generate")


def check_output(path: Path, overwrites: bool, form: Form = GENERATED) -> None:
    """Raises InputError where `path` can not be written, or was written by another command. Changes nothing.

    A cheap check before a model is loaded.
    """
    check_file(path)
    if is_stream(path):
        return
    if not overwrites and path.exists() and not journal_of(path).exists():
        with _opened(path) as file:
            _check_ours(path, file.readline(), form)


def is_standard_output(path: Path) -> bool:
    """Whether `path` is a name of standard output."""
    return str(path) in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def is_stream(path: Path) -> bool:
    """Whether `path` can not be replaced as a file: a pipe, a terminal, a name of standard output."""
    return is_standard_output(path) or (path.exists() and not stat.S_ISREG(path.stat().st_mode))


def journal_of(path: Path) -> Path:
    """Returns the journal of `path`."""
    return Path(f"{os.path.realpath(path)}.partial")  # a link is kept, and its target is written


@contextmanager
def owned_output(path: Path | None, topology: Topology) -> Iterator[None]:
    """Makes this job the only owner of FILE while the block runs, unless FILE is a stream. All ranks call it. Raises
    InputError, naming the owner, where another job has it.
    """
    if path is None or on_first_rank(topology, lambda: is_stream(path)):
        yield
        return
    with owned(Path(os.path.realpath(path)), topology):
        yield


def budget_exit_in(path: Path) -> BudgetExit | None:
    """Returns the exit that a budget chose for the records in the journal, or else in a complete FILE, if any."""
    if is_stream(path):
        return None
    there = next((each for each in (journal_of(path), path) if each.exists()), None)
    if there is None:
        return None
    with _opened(there) as file:
        return BudgetExit.of_tree((_parsed(file.readline()) or {}).get(BUDGET))


class OutputFile:
    """FILE and its journal, for one job in one process, within `owned_output`."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        num_prompts: int | None,
        overwrites: bool,
        form: Form = GENERATED,
        budget_exit: BudgetExit | None = None,
    ):
        """Reads the job's earlier records. Raises InputError where they are another job's.

        A complete FILE has records of `num_prompts` prompts; None where some may be left out. `budget_exit` is kept
        beside the records.
        """
        self.path, self.journal, self._form = path, journal_of(path), form
        self.is_whole = False
        """Whether FILE is complete, and this job's."""
        self.num_errors = 0
        """Number of prompts with an error in a complete FILE."""
        self._budget = {} if budget_exit is None else {BUDGET: budget_exit.tree()}
        self._settings = parse_json(to_json(settings).encode())
        self._job = hashlib.sha256(to_json(self._settings, sort_keys=True).encode()).hexdigest()[:16]
        self._file: AppendedFile | None = None
        self._lines: dict[Key, tuple[int, int]] = {}
        """Offset and length of each completion in the journal."""
        self._errors: dict[Key, bytes] = {}
        """Lines of prompts that failed. They are not kept in the journal, so the next command tries them again."""
        if overwrites:
            return
        if self.journal.exists():
            self._file = self._read_journal()
        elif path.exists():
            self._read_whole(num_prompts)

    @property
    def done(self) -> frozenset[Key]:
        """The completions in the journal."""
        return frozenset(self._lines)

    def write(self, record: Record) -> None:
        """Appends a completion to the journal. Raises InputError where the disk refuses."""
        key = self._key(record)
        if key in self._lines:
            return
        with self._refusals_named():
            file, line = self._begun(), self._line(record)
            self._lines[key] = file.append(line), len(line)

    def fail(self, record: Record) -> None:
        """Keeps the record of a prompt that failed for FILE."""
        self._errors[record["prompt_index"], 0] = self._line(record)

    def finish(self) -> None:
        """Writes FILE from all records. Raises InputError where the disk refuses, or every prompt failed and FILE
        exists.
        """
        if not self._lines and self.path.exists():
            first = parse_json(self._errors[min(self._errors)])["error"]
            raise InputError(
                f"{self.path} is left as it was, for not one of {len(self._errors)} prompts can be done, the first because "
                f"{first}"
            )
        with self._refusals_named(), atomic_file(self.path) as aside, aside.open("wb") as file:
            for key in sorted(self._lines.keys() | self._errors.keys()):
                file.write(self._errors[key] if key in self._errors else self._kept(key))
        with suppress(OSError):
            self.journal.unlink()

    def close(self) -> None:
        """Closes the journal."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begun(self) -> AppendedFile:
        """The journal, with its first line."""
        file = self._file = self._file or AppendedFile(self.journal)
        if not file.end:
            file.append((to_json({"job": self._settings, **self._budget}, ensure_ascii=False) + "\n").encode())
        return file

    def _line(self, record: Record) -> bytes:
        return (to_json(self._form.marked({**record, **self._budget}, self._job), ensure_ascii=False) + "\n").encode()

    def _key(self, record: Record) -> Key:
        marks = self._form.marks(record)
        return marks["prompt_index"], marks["index"]

    def _kept(self, key: Key) -> bytes:
        assert self._file is not None
        return self._file.read(*self._lines[key])

    def _read_journal(self) -> AppendedFile:
        """Reads the journal without a last line that was cut off. Raises InputError where it is another job's."""
        end = 0
        with _opened(self.journal) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                tree = _parsed(line)
                if number == 1:
                    self._check_same((tree or {}).get("job"))
                elif tree is None or self._form.marks(tree).get("job") != self._job:
                    raise InputError(f"line {number} of {self.journal} is damaged; {_REMEDY}")
                else:
                    self._lines[self._key(tree)] = end, len(line)
                end += len(line)
        with self._refusals_named():
            return AppendedFile(self.journal, end)

    def _check_same(self, there: Any) -> None:
        if not isinstance(there, dict):
            raise InputError(f"{self.journal} is not what `ee-tuning {self._form.command} --output` leaves; {_REMEDY}")
        named = differences_text({**there, "prompts": None}, {**self._settings, "prompts": None})
        if named or there.get("prompts") != self._settings.get("prompts"):
            raise InputError(
                f"{self.journal} holds completions of another job, which differs in {named or 'its prompts'}; to go on give "
                f"that job, else {_REMEDY}"
            )

    def _read_whole(self, num_prompts: int | None) -> None:
        prompts = set()
        with _opened(self.path) as file:
            for line in file:
                record = _check_ours(self.path, line, self._form)
                marks = self._form.marks(record)
                if marks["job"] != self._job:
                    raise InputError(
                        f"{self.path} holds completions of another job: the model, the exits, a setting or a prompt was "
                        f"another; {_REMEDY}"
                    )
                prompts.add(marks.get("prompt_index"))
                self.num_errors += "error" in record
        if prompts and num_prompts is not None and len(prompts) != num_prompts:
            raise InputError(
                f"{self.path} holds {len(prompts)} of this job's {num_prompts} prompts, so something was taken out; {_REMEDY}"
            )
        self.is_whole = bool(prompts)

    @contextmanager
    def _refusals_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, InputError) as error:
            cause = error.__cause__ if isinstance(error, InputError) else error
            if not isinstance(cause, OSError) or isinstance(cause, BlockingIOError):
                raise
            reason = cause.strerror or cause
            kept = (
                f"; {len(self._lines)} completions are kept in {self.journal}, and the same command goes on with them"
                if self._lines
                else ""
            )
            raise InputError(
                f"{self.path} can not be written: {reason}; make room, or give another --output{kept}"
            ) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}, which is there, can not be read: {error.strerror}; {_REMEDY}") from error


def _check_ours(path: Path, line: bytes, form: Form) -> Record:
    """Returns the record in a line of FILE, and an empty one for an empty FILE. Raises InputError on any other file."""
    record = _parsed(line) if line else form.marked({form.under: {}} if form.under else {}, "")
    if record is None or not isinstance(form.marks(record).get("job"), str):
        raise InputError(
            f"{path} is there already, and is not what `ee-tuning {form.command} --output` writes; {_REMEDY}"
        )
    return record


def _parsed(line: bytes) -> Record | None:
    try:
        tree = parse_json(line)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None
