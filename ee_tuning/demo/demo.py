"""`ee-tuning demo`: all steps with the shipped model, by the commands a user would type.

The shipped model → convert → tune at TP 2 × PP 2 on four processes → decode held-out prompts over thresholds →
report.json and a picture.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ee_tuning.command_steps import Flag, ee_tuning, run_command, under_torchrun
from ee_tuning.config import load_config, replace, save_config
from ee_tuning.data.sample_corpus import sample_corpus
from ee_tuning.demo.report import draw_report, validation_losses
from ee_tuning.errors import InputError
from ee_tuning.evaluation.quality import ThresholdResult, final_head_loss, measure_thresholds
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.json_file import to_json
from ee_tuning.parallel.topology import destroy_parallel

CHECKOUT = Path(__file__).resolve().parents[2]
JOB = CHECKOUT / "examples" / "tiny.yaml"
THRESHOLDS = (1.1, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2)
MARK = ".ee_tuning_demo"
TRAINING_BYTES = 3_000_000
NUM_PROMPTS, PROMPT_BYTES, NEW_TOKENS = 12, 300, 100


def demo(output: Path) -> None:
    """Runs the demo into the folder `output`. Raises InputError outside of a checkout of the project, which has the
    model.
    """
    if not JOB.is_file():
        raise InputError(f"demo must run from a checkout of the project, which carries the model; {JOB} is not there")
    started, console = time.monotonic(), Console(highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    if (output / MARK).is_file():  # left by an earlier demo
        for made in ("run", "exit_heads", "converted"):
            shutil.rmtree(output / made, ignore_errors=True)
    elif any(output.iterdir()):
        raise InputError(
            f"demo must write into a new folder or that of an earlier demo, and {output} holds something else; give another "
            "--output"
        )
    (output / MARK).touch()
    prompts = _write_text(output / "text")
    job = _write_job(output)
    console.rule("1 of 3: convert", align="left")
    run_command(console, ee_tuning("convert", job, output=output / "converted"))
    console.rule("2 of 3: tune the exit heads, tensor parallel 2 × pipeline parallel 2", align="left")
    layout: dict[str, Flag] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    run_command(console, under_torchrun(4, ee_tuning("tune", job, exits=output / "converted", **layout)))
    shutil.copytree(output / "run" / "exit_heads", output / "exit_heads")
    console.rule("3 of 3: decode held-out code at each threshold", align="left")
    report = _measure(job, output, prompts)
    (output / "report.json").write_text(to_json(report, indent=2) + "\n", encoding="utf-8")
    draw_report(report, output / "report.png")
    _print_summary(console, report, output, time.monotonic() - started)


def _write_text(folder: Path) -> list[str]:
    """Writes training and held-out text as .jsonl. Returns prompts from files unknown to both model and heads."""
    folder.mkdir(exist_ok=True)
    training, held_out = sample_corpus()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        size = 0
        # a mixture, and not the first names of the alphabet or one package
        for name in sorted(training, key=lambda n: n[::-1]):
            if (size := size + len(training[name])) > TRAINING_BYTES:
                break
            file.write(to_json({"text": training[name].decode(errors="replace")}) + "\n")
    texts = [text.decode(errors="replace") for _, text in sorted(held_out.items())]
    (folder / "valid.jsonl").write_text("".join(to_json({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prompts = []
    for text in texts:
        at = text.find("\n    def ", PROMPT_BYTES)
        if at > 0:
            end = text.index("(", at)
            prompts.append(text[end - PROMPT_BYTES : end])
    step = max(1, len(prompts) // NUM_PROMPTS)
    return [p for p in prompts if p.isascii()][::step][:NUM_PROMPTS]


def _write_job(output: Path) -> Path:
    config = load_config(JOB)
    text = output / "text"
    config = replace(
        config,
        model={"path": str(CHECKOUT / config.model.path)},
        tuning={"run_folder": str(output / "run")},
        parallel={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
        data={"paths": (str(text / "train.jsonl"),), "valid_paths": (str(text / "valid.jsonl"),)},
    )
    path = output / "job.yaml"
    save_config(config, path)
    return path


def _measure(job: Path, output: Path, prompts: list[str]) -> dict[str, Any]:
    config = load_config(job, {"exits.path": str(output / "exit_heads")})
    llm = EarlyExitLLM.from_config(config)
    with Progress(transient=True) as progress:
        task = progress.add_task("decoding", total=len(prompts))
        results, full_rate = measure_thresholds(
            llm, prompts, THRESHOLDS, NEW_TOKENS, on_prompt=lambda done: progress.update(task, completed=done)
        )
    before, after = validation_losses(output / "run" / "metrics.jsonl")
    sample = llm.generate(prompts[:1], policy="threshold", threshold=0.8, max_new_tokens=NEW_TOKENS)[0]
    final_loss = final_head_loss(llm, config)
    destroy_parallel()
    return {
        "model": Path(config.model.path).name,
        "num_layers": llm.num_layers,
        "exit_layers": list(llm.exit_layers),
        "num_prompts": len(prompts),
        "new_tokens_per_prompt": NEW_TOKENS,
        "full_depth_tokens_per_second": round(full_rate, 2),
        "exit_loss_before": before,
        "exit_loss_after": after,
        "final_loss": final_loss,
        "thresholds": [_row(result) for result in results],
        "sample": {"prompt": sample.prompt, "text": sample.text, "exit_layers": sample.exit_layers},
    }


def _row(result: ThresholdResult) -> dict[str, Any]:
    return {
        "threshold": result.threshold,
        "speedup": round(result.speedup, 3),
        "agreement": round(result.agreement, 4),
        "mean_exit_layer": round(result.mean_exit_layer, 3),
        "tokens_per_second": round(result.tokens_per_second, 2),
        "exit_histogram": {str(layer): count for layer, count in result.exit_histogram.items()},
    }


def _print_summary(console: Console, report: dict[str, Any], output: Path, seconds: float) -> None:
    """Prints the results and the next commands."""
    before, after = report["exit_loss_before"], report["exit_loss_after"]
    losses = ", ".join(f"layer {layer}: {before[layer]:.2f} → {after[layer]:.2f}" for layer in before)
    console.rule("What happened", align="left")
    console.print(
        f"Exit heads were put on {report['model']} ({report['num_layers']} layers, frozen) and tuned.\n"
        f"Held-out loss in nats per byte: {losses}; the full model's own is {report['final_loss']:.2f}.\n\n"
        "threshold   speed-up   agreement   mean depth"
    )
    for row in report["thresholds"]:
        console.print(
            f"{row['threshold']:>9g}   {row['speedup']:>7.2f}x   {100 * row['agreement']:>8.1f}%   "
            f"{row['mean_exit_layer']:>10.1f}"
        )
    console.print(
        "\nSpeed-up: against the same engine at full depth in this run "
        f"({report['full_depth_tokens_per_second']:.0f} tokens/s).\n"
        "Agreement: share of tokens that the full model would have said after the same text.\n"
        f"Figures: {output}/report.json   Picture: {output}/report.png   {seconds:.0f} s in all"
    )
    console.rule("Next, with a model of your own", align="left")
    console.print(NEXT_STEPS, soft_wrap=True, markup=False)


NEXT_STEPS = """\
ee-tuning convert --model YOUR_LLAMA --exit-layers 8,16,24 --output exits/yours
torchrun --nproc-per-node 8 -m ee_tuning tune --model YOUR_LLAMA --exits exits/yours --data YOUR_TEXT.jsonl --output runs/yours \\
    --pipeline-model-parallel-size 4
ee-tuning generate --model YOUR_LLAMA --exits runs/yours/exit_heads --prompt "…" --threshold 0.8 --show-exits"""
