"""Prints the comparison of `ee-tuning advise` as text or as one JSON object."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.planning.advise import FORMULA, SHARES, Way, cached_per_token, gpu_hours, read_sizes
from ee_tuning.planning.gpus import Gpu
from ee_tuning.text_table import table_lines

_BYTES = 2
"""Bytes of a parameter, and of an element of keys and values, in an engine: bfloat16."""


def print_advice(
    model: ModelConfig, name: str, found: Sequence[Way], gpu: Gpu, *, tokens: int, efficiency: float, as_json: bool
) -> None:
    """Prints every method, with the GPU-hours of tuning on `tokens` tokens."""
    model_cached = _BYTES * cached_per_token(model, model.num_layers)
    hours = [gpu_hours(way.operations, tokens, gpu.tflops, efficiency) for way in found]
    if as_json:
        tree: dict[str, Any] = {
            "model": name,
            "pass_parameters": read_sizes(model).whole,
            "cached_bytes_per_token": model_cached,
            "gpu": gpu.name,
            "tokens": tokens,
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
        f"GPU-hours: {tokens:,} tokens on {gpu.name} at {efficiency:.0%} of {gpu.tflops:g} Tflop/s (assumed)",
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
        ]
        for way, spent in zip(found, hours, strict=True)
    ]
    return table_lines(head, rows, num_left=2)
