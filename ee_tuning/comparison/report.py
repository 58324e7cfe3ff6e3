"""The report of a comparison: a table at the terminal, compare.json, and one page with pictures."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ee_tuning.comparison.job import Comparison
from ee_tuning.comparison.picture import draw_comparison
from ee_tuning.comparison.plan import batch_text
from ee_tuning.comparison.rows import CACHED_TOKENS, Row
from ee_tuning.comparison.ways import WAYS
from ee_tuning.evaluation.bootstrap import Estimate
from ee_tuning.evaluation.calibration_file import as_json
from ee_tuning.evaluation.evaluation_folder import PAGE
from ee_tuning.evaluation.evaluation_report import STYLE, image
from ee_tuning.json_file import to_json
from ee_tuning.storage.atomic_write import atomic_file
from ee_tuning.text_table import table_lines

FORMAT_VERSION = 1
FIGURES = "compare.json"


def write_report(comparison: Comparison, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    """Writes everything into the comparison's folder, and prints the table.

    Raises InputError where the disk refuses.
    """
    folder, metrics = comparison.folder, comparison.metrics
    pictures = draw_comparison(rows, metrics, folder)
    tree = {
        "format_version": FORMAT_VERSION,
        "model": comparison.model,
        "num_layers": comparison.shape.num_layers,
        "depths": comparison.depths,
        "tuning_tokens": comparison.tuning_tokens,
        "metrics": metrics,
        "settings": settings,
        "rows": [row.tree() for row in rows],
    }
    with atomic_file(folder / FIGURES) as temporary:
        temporary.write_text(as_json(tree), encoding="utf-8")
    with atomic_file(folder / PAGE) as temporary:
        temporary.write_text(_page(comparison, rows, settings, pictures), encoding="utf-8")
    if comparison.options.as_json:
        print(as_json(tree), end="", flush=True)
        return
    print("\n".join(lines_of(rows, metrics)))
    print(f"wrote {', '.join(map(str, (folder / FIGURES, folder / PAGE, *pictures)))}", flush=True)


def lines_of(rows: Sequence[Row], metrics: Mapping[str, str]) -> list[str]:
    """Returns the table of a terminal, with the errors of failed ways beneath it."""
    shown = [row for row in rows if row.kind != "failed"]
    lines = table_lines(_head(metrics), [[value for value, _ in _cells(row, metrics)] for row in shown], num_left=2)
    return [*lines, *(f"{row.way}: {row.name} is left out: {row.error}" for row in rows if row.kind == "failed"), ""]


def _head(metrics: Mapping[str, str]) -> list[str]:
    tasks = [f"{task}, {metric}" for task, metric in metrics.items()]
    sizes = ["memory MB", "disk MB", "tokens"]
    return ["way", "tokens leave", "depth", "loss", "tokens/s", "× full depth", "agreement", *tasks, *sizes]


def _cells(row: Row, metrics: Mapping[str, str]) -> list[tuple[str, str]]:
    """Returns the cells of a row: figures with intervals."""
    return [
        (row.way, ""),
        (row.name, ""),
        (f"{row.depth:.1f}", ""),
        _cell(row.loss, "{:.3f}"),
        (f"{row.tokens_per_second or 0:.0f}", ""),
        _cell(row.speedup, "{:.2f}"),
        _cell(row.agreement, "{:.1%}"),
        *(_cell(row.tasks[task], "{:.2f}" if metric == "perplexity" else "{:.1%}") for task, metric in metrics.items()),
        (f"{row.memory_bytes / 1e6:,.1f}", ""),
        (f"{row.disk_bytes / 1e6:,.1f}", ""),
        (f"{row.tuning_tokens:,}", ""),
    ]


def _cell(estimate: Estimate | None, layout: str) -> tuple[str, str]:
    if estimate is None or not math.isfinite(estimate.value):
        return "–", ""
    has_interval = estimate.low < estimate.high
    interval = f"{layout}–{layout}".format(estimate.low, estimate.high) if has_interval else ""
    return layout.format(estimate.value), interval


_LEGEND = """\
All rows are measured on the same held-out text, which nothing was tuned on and no layer was chosen by. Loss: nats per token of held-out
samples after their beginning, each token at the layer where it leaves. Speed: tokens per second while held-out prompts are continued
greedily, one at a time; × full depth is the ratio to the whole model in the same run, its prompts decoded in turn with the others. Depth:
layers per token. Agreement: share of the tokens that the whole model says, too, after the same text. Small figures are 95% intervals over
prompts."""


_STYLE = """\
body { max-width: 84em } img { max-width: 62em } td { border-bottom: 0; padding: .15em .7em; vertical-align: top; line-height: 1.25 }
th { padding: .3em .7em } tr.next td { border-top: 1px solid #c9ced9 } td:nth-child(2), th:nth-child(2) { text-align: left }
"""


def _page(
    comparison: Comparison,
    rows: Sequence[Row],
    settings: dict[str, Any],
    pictures: Sequence[Path],
) -> str:
    """Returns the page as one file, pictures included."""
    name = Path(comparison.model).name
    title = f"{name}: ways to a faster model, compared"
    ways = [way for way in WAYS if any(row.way == way for row in rows)]
    about = "".join(f"<li><b>{way}</b>: {html.escape(WAYS[way].summary)}</li>" for way in ways)
    legend = (
        f"{_LEGEND} Memory: weights as decoding holds them, with keys and values of {CACHED_TOKENS:,} tokens. Disk: files of "
        f"weights, exits included. Tokens: read in tuning, {batch_text(comparison)} for each tuned model, or in a linear fit."
    )
    return "\n".join(
        [
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f"<style>{STYLE}{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(legend)}</p>\n<ul>{about}</ul>",
            *map(image, pictures),
            _table(rows, comparison.metrics),
            _failures(rows),
            f"<h2>What was run</h2>\n<pre>{html.escape(to_json(settings, indent=1, ensure_ascii=False))}</pre>",
            "</body></html>\n",
        ]
    )


def _table(rows: Sequence[Row], metrics: Mapping[str, str]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _head(metrics))
    lines = list[str]()
    shown = [row for row in rows if row.kind != "failed"]
    for place, row in enumerate(shown):
        is_next = place == 0 or row.way != shown[place - 1].way
        page = f'<a href="{html.escape(row.evaluation)}/{PAGE}">{html.escape(row.name)}</a>'
        cells = "".join(map(_td, _cells(row, metrics)[2:]))
        way = html.escape(row.way) if is_next else ""
        lines.append(f"<tr{' class=next' if is_next else ''}><td>{way}</td><td>{page}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"


def _td(cell: tuple[str, str]) -> str:
    value, interval = cell
    return f"<td>{html.escape(value)}" + (f"<br><small>{interval}</small>" if interval else "") + "</td>"


def _failures(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row.kind == "failed"]
    items = "".join(
        f"<li><b>{html.escape(row.way)}</b>, {html.escape(row.name)}: {html.escape(row.error)}</li>" for row in found
    )
    return f"<h2>Left out</h2>\n<ul>{items}</ul>" if found else ""
