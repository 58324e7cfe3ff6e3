"""Prints the comparison of `ee-tuning advise` as text or as one JSON object."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ee_tuning.checkpoint.model_size import cached_per_token
from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.planning.advice_commands import ANSWERS, Run
from ee_tuning.planning.advise import FORMULA, SHARES, Way, gpu_hours, read_sizes
from ee_tuning.planning.gpus import Gpu
from ee_tuning.text_table import table_lines

_BYTES = 2
"""Bytes of a parameter, and of an element of keys and values, in an engine: bfloat16."""


def print_advice(
    model: ModelConfig, name: str, found: Sequence[Way], gpu: Gpu, *, run: Run, efficiency: float, as_json: bool
) -> None:
    """Prints every method, with the GPU-hours of tuning for `run`."""
    model_cached = _BYTES * cached_per_token(model, model.num_layers)
    hours = [gpu_hours(way.operations, run.tokens, gpu.tflops, efficiency) for way in found]
    if as_json:
        tree: dict[str, Any] = {
            "model": name,
            "pass_parameters": read_sizes(model).whole,
            "cached_bytes_per_token": model_cached,
            "gpu": gpu.name,
            "tokens": run.tokens,
            "train_iters": run.train_iters,
            "efficiency": efficiency,
            "shares": list(SHARES),
            "ways": [
                {
                    **dataclasses.asdict(way),
                    "gpu_hours": spent,
                    "added_bytes": _BYTES * way.added,
                    "cached_bytes_per_token": _BYTES * way.cached,
                }
                for way, spent in zip(found, hours, strict=True)
            ],
            "formula": list(FORMULA),
        }
        print(to_json(tree, indent=2))
        return
    whole = read_sizes(model).whole
    lines = [
        f"{name}: a token reads {whole / 1e9:.2f}·10⁹ parameters; in bfloat16 at {gpu.bandwidth:g} GB/s ({gpu.name}) no more than "
        f"{gpu.bandwidth * 1e9 / (_BYTES * whole):,.0f} tokens/s at batch 1. Its keys and values take {model_cached:,} bytes per token of context",
        "",
        *_table(found, hours),
        "",
        "GB more and B/token more: what the engine holds besides the model's weights, and keys and values of each token of context, in bfloat16",
        f"speed-ups are what the shapes allow where a share {', '.join(f'{share:g}' for share in SHARES)} of the drafts is right, or of the "
        "tokens leaves. That share has to be measured: validation tells `acceptance` while tuning, `ee-tuning calibrate` the rest",
        f"GPU-hours: tuning on {run.tokens:,} tokens ({run.train_iters:,} steps of {run.global_batch_size} sequences of {run.seq_length:,}), {gpu.name} at "
        f"{efficiency:.0%} of {gpu.tflops:g} Tflop/s (assumed). The model's own answers, {ANSWERS}, are made before, which is decoding and not "
        "counted; where they are fewer tokens, tune goes over them again, and more answers teach more than more passes",
        f"GPUs: the fewest {gpu.name} of {gpu.memory:g} GB, up to 8 or in machines of 8, that hold the tuning run in bfloat16, by a dry run as in `ee-tuning plan`",
        "TEXTS and HELD_OUT in the commands stand for texts of yours, of the kind that the model will be asked, PROMPTS for beginnings of such texts, "
        "and HOST for the first machine",
        *(f"  {formula}" for formula in FORMULA),
        "",
    ]
    for way in found:
        lines += [f"{way.name}:", *(f"  {command}" for command in way.commands)]
    print("\n".join(lines))


def _table(found: Sequence[Way], hours: Sequence[float]) -> list[str]:
    head = [
        "way",
        "runs in",
        "trained",
        "GB more",
        "B/token more",
        "step",
        *(f"× at {share:g}" for share in SHARES),
        "GPU-hours",
        "GPUs",
    ]
    rows = [
        [
            way.name,
            way.runs_in,
            f"{way.trained / 1e6:,.1f}M",
            f"{_BYTES * way.added / 1e9:.2f}",
            f"{_BYTES * way.cached:,}",
            f"{way.step:.3f}",
            *(f"{speed_up:.2f}" for speed_up in way.speed_ups),
            f"{spent:,.1f}",
            f"{way.gpus or 'none'}",
        ]
        for way, spent in zip(found, hours, strict=True)
    ]
    return table_lines(head, rows, num_left=2)
