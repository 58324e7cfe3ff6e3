"""The output folder of a public benchmark (lm-evaluation-harness, HumanEval), updated after each policy."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ee_tuning.differences import differences_text
from ee_tuning.errors import InputError
from ee_tuning.evaluation.evaluation_folder import OWNER
from ee_tuning.evaluation.points import Point
from ee_tuning.generation.budget_exit import budgets_of_tree, budgets_tree
from ee_tuning.json_file import parse_json, read_json, to_json
from ee_tuning.storage.apart import check_folder_writable
from ee_tuning.storage.atomic_write import atomic_file

_OWN = re.compile(r"(results|completions)_.*|.*\.partial-[0-9a-f]{8}")
"""Files that a killed job may leave before its first summary."""
_REMEDY = "give another --output, or --overwrite to start over"

Figures = dict[str, Any]


_BUDGETS = "budgets"


def budgets_in(folder: Path, summary: str) -> dict[float, int]:
    """Returns the exits that budgets chose for the figures in `folder`; empty without any."""
    return budgets_of_tree(_read(folder / summary).get(_BUDGETS)) if (folder / summary).exists() else {}


class BenchmarkFolder:
    """The folder on rank 0, within `owned`. `summary` names the file that holds the job and all figures."""

    def __init__(self, folder: Path, summary: str, job: Mapping[str, Any], *, overwrites: bool):
        """Raises InputError where `folder` holds anything else, or another job's figures, without `overwrites`."""
        self.folder, self.path = folder, folder / summary
        self._job: dict[str, Any] = parse_json(to_json(job).encode())
        self._points: dict[str, Any] = {}
        self._budgets: dict[float, int] = {}
        check_folder(folder, summary, overwrites=overwrites)
        if self.path.exists() and not overwrites:
            tree = _read(self.path)
            self._check_same(tree["job"])
            self._points = tree["points"]
            self._budgets = budgets_of_tree(tree.get(_BUDGETS))

    def known(self, point: Point) -> Figures | None:
        """Returns the stored figures of a point, if any. Raises InputError where they belong to another policy of that
        name.
        """
        there: Figures | None = self._points.get(point.name)
        if there is not None and there["policy"] != point.description():
            raise InputError(
                f"{self.folder} holds a {point.name} that {there['policy']}, and now it {point.description()}; {_REMEDY}"
            )
        return there

    def file(self, kind: str, point: Point) -> Path:
        """Returns the file of one policy."""
        base, _, ending = kind.partition(".")
        return self.folder / f"{base}_{re.sub(r'[^A-Za-z0-9.-]+', '_', point.name)}.{ending}"

    def keep_budgets(self, chosen: Mapping[float, int]) -> None:
        """Keeps the exits that budgets chose: beside the figures that are there, or else together with the first."""
        before, self._budgets = self._budgets, {**self._budgets, **chosen}
        if self._points and self._budgets != before:
            self._write_summary()

    def keep(self, point: Point, figures: Mapping[str, Any], files: Mapping[str, str]) -> Figures:
        """Writes `files` (kind -> content), then the summary, and returns the figures.

        If the process is killed in between, the point counts as not done.
        """
        for kind, content in files.items():
            _write(self.file(kind, point), content)
        self._points[point.name] = {"policy": point.description(), **parse_json(to_json(figures).encode())}
        self._write_summary()
        kept: Figures = self._points[point.name]
        return kept

    def _write_summary(self) -> None:
        budgets = {_BUDGETS: budgets_tree(self._budgets)} if self._budgets else {}
        tree = {"job": self._job, **budgets, "points": self._points}
        _write(self.path, to_json(tree, indent=2, ensure_ascii=False) + "\n")

    def _check_same(self, there: Mapping[str, Any]) -> None:
        if differences := differences_text(there, self._job):
            raise InputError(
                f"{self.folder} holds another job's figures, which differs in {differences}; to go on give that job, else {_REMEDY}"
            )


def check_folder(folder: Path, summary: str, *, overwrites: bool) -> None:
    """Raises InputError where `folder` can not be written, or holds anything else than such a job. Changes nothing."""
    check_folder_writable(folder)
    if not folder.is_dir():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name != OWNER)
    foreign = [name for name in others if not _OWN.fullmatch(name)]
    if foreign and summary not in others:
        raise InputError(
            f"--output must be a new folder or that of the same benchmark, and {folder} holds {foreign[0]}; give another"
        )
    if summary in others and not overwrites:
        _read(folder / summary)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path)
        if (
            isinstance(tree, dict)
            and isinstance(tree["job"], dict)
            and all("policy" in each for each in tree["points"].values())
        ):
            return tree
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{path} was not written by `ee-tuning evaluate`; {_REMEDY}")


def _write(path: Path, content: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(content, encoding="utf-8", newline="\n")
