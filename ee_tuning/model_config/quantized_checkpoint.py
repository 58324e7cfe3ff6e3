"""Refuses checkpoints with quantized weights (AWQ, GPTQ, FP8, bitsandbytes, …), by their config.json."""

from pathlib import Path
from typing import Any

from ee_tuning.errors import InputError

_KEYS = ("quantization_config", "compression_config")


def refuse_quantized(raw: dict[str, Any], path: Path) -> None:
    """Raises InputError, naming `path`, where a parsed config.json describes a quantization."""
    for key in _KEYS:
        fields = raw.get(key)
        if not fields:
            continue
        if not isinstance(fields, dict):
            raise InputError(f"{path}: {key} must be an object, got {fields!r}; fetch the model's own config.json")
        raise InputError(
            f"{path}: the weights are quantized by {_method(fields)} ({key}), and only plain float32, bfloat16 and float16 "
            f"are read; give the model that they were made from. Where the files hold plain floats again, take {key} out of "
            "config.json"
        )


def _method(fields: dict[str, Any]) -> str:
    method = str(
        fields.get("quant_method") or fields.get("quant_algo") or fields.get("format") or "a method that is not named"
    )
    bits = fields.get("bits") or (4 if fields.get("load_in_4bit") else 8 if fields.get("load_in_8bit") else None)
    return f"{method} in {bits} bits" if isinstance(bits, int) else method
