"""Writes the model's weights that a run trained: LoRA's matrices as peft saves them, or whole tensors.

Either folder is given to other commands as --adapter, which apply it to the model that it was trained for.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ee_tuning.artifact.convert import model_name
from ee_tuning.checkpoint.adapted_source import LORA, LORA_STEM, TRAINED, TRAINED_STEM
from ee_tuning.checkpoint.formats import model_folder
from ee_tuning.checkpoint.model_card import trained_card
from ee_tuning.checkpoint.trained_names import lora_targets, trained_shapes
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.manifest import MANIFEST
from ee_tuning.storage.tensor_folder import write_tensor_folder

ADAPTER, CARD = "adapter", "README.md"
"""The folder, within a run's, and its card."""


def save_trained_weights(
    output: Path,
    config: Config,
    model: ModelConfig,
    stored: torch.dtype,
    facts: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    topology: Topology,
) -> None:
    """Writes the folder. LoRA's matrices are float32, whole tensors the model's `stored` dtype.

    All ranks iterate over `tensors`, and each tensor comes from exactly one. `facts` describe the run. Raises
    InputError where the disk refuses, or `output` holds something else.
    """
    is_lora = config.tuning.trained.kind == "lora"
    stem, dtype = (LORA_STEM, torch.float32) if is_lora else (TRAINED_STEM, stored)

    def complete(partial: Path) -> None:
        name, tree = (LORA, _lora_config(config, model)) if is_lora else (TRAINED, facts)
        (partial / name).write_text(to_json(tree, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(trained_card(model_name(model_folder(config.model.path)), facts), encoding="utf-8")

    on_first_rank(topology, lambda: check_trained_output(output))
    shapes = trained_shapes(config.tuning, model)
    write_tensor_folder(output, topology, tensors, stem, shapes, dtype, complete)


def check_trained_output(output: Path) -> None:
    """Raises InputError where `output` exists and holds anything but trained weights."""
    if not output.exists():
        return
    own = (LORA, TRAINED, MANIFEST, CARD)
    if not output.is_dir() or any(
        path.name not in own and not path.name.startswith((LORA_STEM, TRAINED_STEM)) for path in output.iterdir()
    ):
        raise InputError(
            f"{output} exists and is no folder of trained weights, which would take its place; move it away"
        )


def _lora_config(config: Config, model: ModelConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.path,
        "r": config.tuning.lora_rank,
        "lora_alpha": config.tuning.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora_targets(config.tuning, model)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
