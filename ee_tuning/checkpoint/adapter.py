"""Refuses the files of an adapter (LoRA and similar ones, as peft saves them) in a model's folder."""

import json
from pathlib import Path

from ee_tuning.checkpoint.unread import MERGE
from ee_tuning.errors import InputError

_CONFIG = "adapter_config.json"
_FILES = (_CONFIG, "adapter_model.safetensors", "adapter_model.bin", "adapter.safetensors", "adapters.safetensors")


def refuse_adapter(folder: Path) -> None:
    """Raises InputError where `folder` holds an adapter, even beside a model.

    transformers would load the adapter's base model and apply the adapter, and no file says whether the weights beside
    it already include it.
    """
    found = [name for name in _FILES if (folder / name).is_file()]
    if not found:
        return
    what = f"{folder} holds an adapter ({', '.join(found)}{_base(folder / _CONFIG)})"
    if (folder / "config.json").is_file():
        raise InputError(
            f"{what} beside a model, and no file says whether the weights include it: if they do, move the adapter's "
            f"files away; if not, {MERGE}"
        )
    raise InputError(f"{what} and no model; give its model by --model and this folder by --adapter, or {MERGE}")


def _base(config: Path) -> str:
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
        return f", made for {tree['base_model_name_or_path']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
