"""Plots of a run from its metrics.jsonl: plots.png, and plots.html with the last figures beside it."""

import base64
import html
import json
from pathlib import Path
from typing import Any

from ee_tuning.line_file import read_lines
from ee_tuning.pictures import picture
from ee_tuning.storage.atomic_write import atomic_file
from ee_tuning.training_log.metrics import METRICS, MetricsRecord

PNG, HTML = "plots.png", "plots.html"
PANELS = {
    ("train", "loss"): "training loss",
    ("validation", "loss"): "validation loss",
    ("validation", "perplexity"): "validation perplexity",
    ("validation", "confidence"): "mean confidence",
    ("validation", "above_0.8"): "share of tokens above 0.8",
    ("validation", "speed_up"): "speed-up implied, at least, by threshold",
    ("validation", "agreement"): "agreement with the final head",
    ("validation", "acceptance"): "drafts that speculation would accept",
    ("validation", "mean_acceptance_length"): "mean acceptance length of drafts",
    ("train", "grad_norm"): "gradient norm before the clip",
    ("train", "lr"): "learning rate",
    ("train", "tokens_per_second"): "tokens per second",
    ("train", "idle_share"): "idle share, by stage",
}
"""Kind and key of a record -> title. Panels without a record are left out."""
_COLUMNS = 3


def write_plots(folder: Path, title: str) -> None:
    """Draws the run in `folder`, whose metrics.jsonl is complete. Draws nothing where there are no records.

    Raises InputError where the disk refuses.
    """
    path = folder / METRICS
    records = [json.loads(line) for line in read_lines(path)] if path.exists() else []
    panels = [
        panel for panel in PANELS if any(record["kind"] == panel[0] and record.get(panel[1]) for record in records)
    ]
    if not panels:
        return
    num_rows = -(-len(panels) // _COLUMNS)
    with picture(
        folder / PNG, rows=num_rows, columns=_COLUMNS, size=(5 * _COLUMNS, 3.2 * num_rows), title=title
    ) as axes:
        for place, panel in zip(axes, panels, strict=False):
            _panel(place, records, *panel)
        for place in axes[len(panels) :]:
            place.set_axis_off()
    with atomic_file(folder / HTML) as partial:
        partial.write_text(_page(records, (folder / PNG).read_bytes(), title), encoding="utf-8")


def _panel(ax: Any, records: list[MetricsRecord], kind: str, key: str) -> None:
    own = [record for record in records if record["kind"] == kind and record.get(key) is not None]
    is_dict = isinstance(own[0][key], dict)
    names = list(dict.fromkeys(name for record in own for name in record[key])) if is_dict else [""]
    for name in names:
        points = [(record["step"], record[key].get(name) if name else record[key]) for record in own]
        known = [(step, value) for step, value in points if value is not None]
        ax.plot(
            [step for step, _ in known],
            [value for _, value in known],
            label=name,
            marker="." if kind == "validation" else None,
            linewidth=1.2,
        )
    ax.set_title(PANELS[kind, key], fontsize=10)
    ax.set_xlabel("step")
    ax.grid(alpha=0.3)
    if len(names) > 1:
        ax.legend(fontsize=7, ncols=2)


def _page(records: list[MetricsRecord], png: bytes, title: str) -> str:
    image = base64.b64encode(png).decode()
    return (
        f"<!doctype html>\n<meta charset=utf-8>\n<title>{html.escape(title)}</title>\n"
        "<style>body{font-family:sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:right}img{max-width:100%}</style>\n"
        f'<h1>{html.escape(title)}</h1>\n{_table(records)}<img alt="plots" src="data:image/png;base64,{image}">\n'
    )


def _table(records: list[MetricsRecord]) -> str:
    """Builds the table of the last validation's figures, by exit."""
    last = next((record for record in reversed(records) if record["kind"] == "validation"), None)
    if last is None:
        return ""
    columns = [key for key, value in last.items() if isinstance(value, dict) and value.keys() == last["loss"].keys()]
    head = "".join(f"<th>{html.escape(name)}" for name in ("exit", *columns))
    rows = "".join(
        f"<tr><td>{layer}" + "".join(f"<td>{_number(last[key][layer])}" for key in columns) + "\n"
        for layer in last["loss"]
    )
    return f"<p>Held out, after step {last['step']}:\n<table><tr>{head}\n{rows}</table>\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
