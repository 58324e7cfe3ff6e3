"""The results of `ee-tuning demo --llm`: report.json with its picture, and the final screen."""

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ee_tuning.config import load_config
from ee_tuning.data.chat_template import ChatTemplate
from ee_tuning.demo.report import draw_report, validation_losses
from ee_tuning.evaluation.quality import final_head_loss
from ee_tuning.generation.chat import stop_ids_of
from ee_tuning.generation.command import exit_colours
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.json_file import to_json
from ee_tuning.parallel.topology import destroy_parallel

QUESTION = "What is the most important thing to know about rainbows?"
ENOUGH = 0.99
"""Share of full depth's score that a policy must keep."""


def write_report(folder: Path, calibration: Path) -> None:
    """Writes report.json and report.png from the steps' outputs in `folder`. Its sample answer uses `calibration`."""
    config = load_config(
        folder / "run" / "config.yaml",
        {"exits.path": str(folder / "run" / "exit_heads"), "generation.calibration": str(calibration)},
    )
    llm = EarlyExitLLM.from_config(config)
    before, after = validation_losses(folder / "run" / "metrics.jsonl")
    sample, parts = _answered(llm)
    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    task = evaluation["tasks"][0]
    full = task["points"][0]
    report = {
        "model": "SmolLM2-135M-Instruct",
        "path": config.model.path,
        "calibration": str(calibration),
        "num_layers": llm.num_layers,
        "exit_layers": list(llm.exit_layers),
        "task": task["name"],
        "metric": task["metric"],
        "num_prompts": task["num_prompts"],
        "full_depth_tokens_per_second": full["tokens_per_second"],
        "full_depth_score": full["metric"]["value"],
        "exit_loss_before": before,
        "exit_loss_after": after,
        "final_loss": final_head_loss(llm, config),
        "thresholds": [_row(point) for point in task["points"] if point["kind"] in ("threshold", "calibration")],
        "speculative": [_row(point) for point in task["points"] if point["kind"] == "speculative"],
        "sample": {"prompt": QUESTION, "text": sample.text, "exit_layers": sample.exit_layers, "parts": parts},
    }
    destroy_parallel()
    draw_report(report, folder / "report.png")
    (folder / "report.json").write_text(to_json(report, indent=2) + "\n", encoding="utf-8")


def _answered(llm: EarlyExitLLM) -> tuple[Completion, list[tuple[str, int]]]:
    """Returns an answer under the calibrated thresholds, and its text in pieces with the layer at which each one
    left.
    """
    template, completions = ChatTemplate(llm.tokenizer, None), list[Completion]()
    prompt = template.render([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    stream = llm.stream(
        [prompt], completions, adds_special_tokens=False, stop_token_ids=stop_ids_of(llm, template), max_new_tokens=100
    )
    parts = [(token.text, token.exit_layer) for token in stream]
    return completions[0], parts


def _row(point: dict[str, Any]) -> dict[str, Any]:
    columns = {
        "speedup": "speedup",
        "relative": "relative",
        "score": "metric",
        "agreement": "agreement",
        "identical": "identical",
        "mean_exit_layer": "mean_depth",
    }
    return {
        "threshold": point["value"],
        "name": point["name"],
        **{name: point[key]["value"] for name, key in columns.items()},
        "exit_histogram": {layer: each["value"] for layer, each in point["exits"].items()},
    }


def print_summary(console: Console, report: dict[str, Any], folder: Path, seconds: float) -> None:
    """Prints the results, an answer coloured by exits, and the next commands."""
    console.rule("What was reached", align="left")
    before, after = report["exit_loss_before"], report["exit_loss_after"]
    losses = ", ".join(f"layer {layer}: {before[layer]:.2f} → {after[layer]:.2f}" for layer in before)
    console.print(
        f"Held-out loss of the fitted exits in nats per token, before and after tuning: {losses}; the model's own is "
        f"{report['final_loss']:.2f}.\n{report['task']}, {report['num_prompts']} prompts: full depth scores "
        f"{report['full_depth_score']:.1%} at {report['full_depth_tokens_per_second']:.0f} tokens/s.\n",
        soft_wrap=True,
    )
    console.print("                    score   of full depth's   speed-up   agreement   mean depth")
    for row in [*report["thresholds"], *report["speculative"]]:
        console.print(
            f"{row['name']:<16}  {row['score']:>7.1%}   {row['relative']:>15.1%}   {row['speedup']:>7.2f}x   "
            f"{row['agreement']:>9.1%}   {row['mean_exit_layer']:>10.1f}"
        )
    console.print(f"\n{_verdict(report)}\n", soft_wrap=True)
    _show_answer(console, report)
    console.print(
        f"\nFigures: {folder}/report.json, {folder}/evaluation/index.html   Picture: {folder}/report.png   {seconds:.0f} s in "
        "this call",
        soft_wrap=True,
    )
    console.rule("Next", align="left")
    console.print(
        f"ee-tuning chat --model {shlex.quote(report['path'])} --exits {shlex.quote(str(folder / 'run' / 'exit_heads'))} "
        f"--calibration {shlex.quote(report['calibration'])} --show-exits",
        soft_wrap=True,
        markup=False,
    )


def _verdict(report: dict[str, Any]) -> str:
    good = [row for row in report["thresholds"] if row["relative"] >= ENOUGH]
    best = max(good, key=lambda row: row["speedup"], default=None)
    sentence = (
        f"Leaving early keeps {best['relative']:.1%} of the score at {best['speedup']:.2f} x full depth's speed ({best['name']})."
        if best
        else f"No threshold keeps {ENOUGH:.0%} of the score."
    )
    for row in report["speculative"]:
        sentence += f" Speculation gives full depth's own answers to {row['identical']:.1%} of the prompts at {row['speedup']:.2f} x."
    return sentence


def _show_answer(console: Console, report: dict[str, Any]) -> None:
    early = [layer for layer in report["exit_layers"] if layer < report["num_layers"]]
    colours = exit_colours(early)
    sample = report["sample"]
    legend = Text("An answer, coloured by where tokens left: ")
    for layer in early:
        legend.append(f"layer {layer}", style=colours[layer]).append(", ")
    console.print(legend.append("plain: the end"))
    answer = Text.assemble(*((text, colours.get(layer, "")) for text, layer in sample["parts"]))
    console.print(Text(f"{sample['prompt']}\n", style="dim"), answer, sep="", soft_wrap=True)
