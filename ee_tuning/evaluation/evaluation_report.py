"""Reports of `ee-tuning evaluate`: evaluation.json, pictures, one page with all of them, and a table at the
terminal.
"""

import base64
import dataclasses
import html
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ee_tuning.evaluation.bootstrap import DRAWS, LEVEL, Estimate
from ee_tuning.evaluation.calibration_file import as_json
from ee_tuning.evaluation.evaluation_folder import FIGURES, PAGE
from ee_tuning.evaluation.evaluation_picture import draw_evaluation
from ee_tuning.evaluation.figures import Evaluation, PointResult, TaskResult
from ee_tuning.evaluation.task import Task
from ee_tuning.json_file import to_json
from ee_tuning.storage.atomic_write import atomic_file

FORMAT_VERSION = 1
_EXAMPLES, _EXAMPLE_LENGTH = 8, 300

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2430; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: right; white-space: nowrap }
th { border-bottom: 2px solid #c9ced9; font-weight: 600 } td { border-bottom: 1px solid #e5e8ee } td small { color: #6b7183 }
th:first-child, td:first-child, .said td { text-align: left } .said td { white-space: pre-wrap; vertical-align: top }
img { max-width: 100%; display: block; margin: 1em 0 } pre { background: #f4f5f8; padding: 1em; overflow-x: auto }
"""
_LEGEND = f"""\
Each figure stands with its {LEVEL:.0%} interval over prompts ({DRAWS} bootstrap draws, the same prompts for a way to leave and for full
depth). Speed-up: tokens per second, the reading of prompts included, over full depth's in the same run. Time saved: of the seconds that
full depth took for all prompts; the two differ where completions have other lengths. Mean depth: layers behind which tokens left.
Agreement: share of the tokens that the full model says, too, after the same text. Identical: prompts to which all that is said is full
depth's."""


def write_reports(found: Evaluation, tasks: list[Task], about: dict[str, Any], folder: Path) -> list[Path]:
    """Writes all reports. `about` describes model, settings and machines. Raises InputError where the disk refuses."""
    pictures = draw_evaluation(found, folder)
    tree = {
        "format_version": FORMAT_VERSION,
        **about,
        "intervals": {"level": LEVEL, "draws": DRAWS, "method": "percentile bootstrap"},
        "tasks": [dataclasses.asdict(task) for task in found.tasks],
    }
    with atomic_file(folder / FIGURES) as temporary:
        temporary.write_text(as_json(tree), encoding="utf-8")
    with atomic_file(folder / PAGE) as temporary:
        temporary.write_text(_page(found, tasks, about, pictures), encoding="utf-8")
    return [folder / FIGURES, folder / PAGE, *pictures]


def print_tables(found: Evaluation) -> None:
    """Prints a table per task, without intervals where the terminal is narrow."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    for task in found.tasks:
        console.print(_title(task))
        table = Table(box=None, pad_edge=False)
        for place, name in enumerate(_head(task)):
            table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
        for point in task.points:
            table.add_row(
                *(
                    value + (f" ({interval})" if interval and console.width >= 140 else "")
                    for value, interval in _row(task, point, found.num_layers)
                )
            )
        console.print(table)


def _title(task: TaskResult) -> str:
    rate = task.full_depth.tokens_per_second
    return f"{task.name}: {task.metric}, {task.num_prompts} prompts" + (
        f"; full depth made {rate:.1f} tokens/s" if rate else ""
    )


def _head(task: TaskResult) -> list[str]:
    others = task.full_depth.other_metrics
    return ["", task.metric, "of full depth", *others, "speed-up", "time saved", "mean depth", "agreement", "identical"]


def _row(task: TaskResult, point: PointResult, num_layers: int) -> list[tuple[str, str]]:
    """Returns the cells of a row: figures with intervals."""
    is_full, quality = point is task.full_depth, _plain if task.metric == "perplexity" else _percent
    return [
        (point.name, ""),
        quality(point.metric),
        ("1", "") if is_full else _percent(point.relative),
        *map(quality, point.other_metrics.values()),
        ("1", "") if is_full and point.speedup else _plain(point.speedup),
        ("", "") if is_full else _percent(point.time_saved),
        _plain(point.mean_depth) if not is_full else (str(num_layers), ""),
        ("", "") if is_full else _percent(point.agreement),
        ("", "") if is_full else _percent(point.identical),
    ]


def _percent(estimate: Estimate | None) -> tuple[str, str]:
    return _cell(estimate, lambda value: f"{100 * value:.1f}%", lambda value: f"{100 * value:.1f}")


def _plain(estimate: Estimate | None) -> tuple[str, str]:
    return _cell(estimate, lambda value: f"{value:.2f}", lambda value: f"{value:.2f}")


def _cell(estimate: Estimate | None, shown: Any, bound: Any) -> tuple[str, str]:
    if estimate is None or estimate.value != estimate.value:
        return "–", ""
    return shown(estimate.value), f"{bound(estimate.low)}–{bound(estimate.high)}"


def _page(found: Evaluation, tasks: list[Task], about: dict[str, Any], pictures: list[Path]) -> str:
    """Returns the page as one file, pictures included."""
    against = f" against {about['against']}" if "against" in about else ""
    title = f"{about['model']}{against}: leaving early, measured"
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(_LEGEND)}</p>"
    ]
    for number, (task, result) in enumerate(zip(tasks, found.tasks, strict=True)):
        parts.append(f"<h2>{html.escape(_title(result))}</h2>")
        parts.append(_table(result, found.num_layers))
        parts += [image(path) for path in pictures[2 * number : 2 * number + 2]]
        parts.append(_exits_table(result, found.num_layers))
        parts.append(_said(found, task))
    parts.append(
        f"<h2>What was run</h2>\n<pre>{html.escape(to_json(about, indent=1, ensure_ascii=False))}</pre>\n</body></html>\n"
    )
    return "\n".join(parts)


def _table(task: TaskResult, num_layers: int) -> str:
    rows = "".join(
        f"<tr>{''.join(_td(*cell) for cell in _row(task, point, num_layers))}</tr>\n" for point in task.points
    )
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in _head(task))}</tr>\n{rows}</table>"


def _exits_table(task: TaskResult, num_layers: int) -> str:
    """Returns the table of the layers at which tokens left, the second picture in numbers."""
    layers = sorted(task.full_depth.exits)
    head = "".join(f"<th>{'the end' if layer == num_layers else f'layer {layer}'}</th>" for layer in layers)
    rows = "".join(
        f"<tr><td>{html.escape(point.name)}</td>{''.join(_td(*_percent(point.exits[layer])) for layer in layers)}</tr>\n"
        for point in task.points
    )
    return f"<table><tr><th>tokens that left behind</th>{head}</tr>\n{rows}</table>"


def _td(value: str, interval: str) -> str:
    return f"<td>{html.escape(value)}" + (f" <small>{interval}</small>" if interval else "") + "</td>"


def image(path: Path) -> str:
    """Returns a picture as part of a page."""
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _said(found: Evaluation, task: Task) -> str:
    """Returns the first prompts whose completions differ from full depth's under any policy."""
    by_item = dict[int, list[tuple[str, str, bool]]]()  # nothing is generated for perplexity
    for each in found.readings:
        if each.task == task.name:
            by_item.setdefault(each.item, []).append((each.point, each.text, each.is_same is not False))
    differing = [place for place, said in sorted(by_item.items()) if not all(is_same for _, _, is_same in said)][
        :_EXAMPLES
    ]
    rows = list[str]()
    for place in differing:
        item = task.items[place]
        asked = item.prompt if item.prompt is not None else item.messages[-1]["content"]
        ways = dict[str, list[str]]()
        for point, text, _ in by_item[place]:
            ways.setdefault(text, []).append(point)
        right = html.escape(_cut(" | ".join(item.answers)))
        rows.append(f'<tr><td colspan="2"><b>{html.escape(_end_of(asked))}</b> <small>{right}</small></td></tr>')
        rows += [
            f"<tr><td>{html.escape(', '.join(points))}</td><td>{html.escape(_cut(text))}</td></tr>"
            for text, points in ways.items()
        ]
    return (
        f'<h3>Where they differ: the first {len(differing)}</h3>\n<table class="said">{"".join(rows)}</table>'
        if rows
        else ""
    )


def _end_of(text: str) -> str:
    return text if len(text) <= _EXAMPLE_LENGTH else f"…{text[-_EXAMPLE_LENGTH:]}"


def _cut(text: str) -> str:
    return text if len(text) <= _EXAMPLE_LENGTH else f"{text[:_EXAMPLE_LENGTH]}…"
