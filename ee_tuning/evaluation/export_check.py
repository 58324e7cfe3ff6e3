"""Compares an exported Hugging Face folder with this project's engine: largest logit difference per exit, on real
text.
"""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.checkpoint.export_huggingface import MODELLING, early_exit_class
from ee_tuning.checkpoint.load import LoadedModel, compute_dtype, load_for_generation
from ee_tuning.config import Config, ParallelSection
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_of
from ee_tuning.errors import InputError
from ee_tuning.model.config import ModelConfig
from ee_tuning.parallel.shortlist import token_logits
from ee_tuning.parallel.topology import destroy_parallel, init_parallel

MAX_TOKENS = 512


def check_export(config: Config, output: Path, text: str, tolerance: float) -> bool:
    """Prints a line per exit and one for the final head. Returns whether all differences are within `tolerance`.

    Both sides compute in model.dtype. Raises InputError where the text can not be tokenized.
    """
    tokenizer = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
    config = dataclasses.replace(config, parallel=ParallelSection())  # one process compares, for any layout of the job
    topology = init_parallel(config.parallel)
    loaded = load_for_generation(config, topology)
    limit = min(MAX_TOKENS, loaded.model.config.max_position_embeddings)
    ids = torch.tensor([tokenizer(text)["input_ids"][:limit]])
    if ids.numel() < 2:
        raise InputError(f"the check needs a text of at least two tokens, got {ids.numel()}; give another --text")
    ours = _our_logits(loaded, ids)
    theirs = _exported_logits(output, loaded.model.config, ids.to(topology.device), compute_dtype(config, topology))
    destroy_parallel()
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    is_close = True
    for layer in sorted(ours):
        # Where a shortlisted exit can not predict a token, both logits are -inf, whose difference would be NaN.
        difference = torch.where(ours[layer] == theirs[layer], 0.0, ours[layer] - theirs[layer]).abs().max().item()
        is_within = difference <= tolerance  # false for NaN, too
        name = "the model's own head" if layer == loaded.model.config.num_layers else f"exit after layer {layer}"
        print(
            f"{name}: largest logit difference {difference:.2e} over {ids.shape[1]} tokens"
            + ("" if is_within else f", above the tolerance of {tolerance:g}")
        )
        is_close = is_close and is_within
    return is_close


@torch.no_grad()
def _our_logits(loaded: LoadedModel, ids: Tensor) -> dict[int, Tensor]:  # [1, s] -> layer -> [s, v]
    model = loaded.model
    hidden, inputs = model.run_layers(model.embed(ids.to(model.topology.device)))
    early = {
        layer: token_logits(model.exit_head(layer)(x, F.linear), model.exit_vocab)
        for layer, x in inputs.items()
        if layer < model.config.num_layers
    }
    final = F.linear(model.final_hidden(hidden), model.backbone.output_layer.weight)
    return {layer: logits[:, 0].double().cpu() for layer, logits in {**early, model.config.num_layers: final}.items()}


def _exported_logits(
    folder: Path, config: ModelConfig, ids: Tensor, dtype: torch.dtype
) -> dict[int, Tensor]:  # layer -> [s, v]
    """Runs the folder's modelling file in place and returns its logits; transformers would copy the file to its cache
    first.
    """
    module = _module(folder / MODELLING.name)
    # transformers' default for experts, grouped products, refuses widths that are no multiple of 16 bytes.
    plain = {"experts_implementation": "eager"} if config.num_experts else {}
    model = (
        getattr(module, early_exit_class(config))
        .from_pretrained(folder, dtype=dtype, trust_remote_code=False, **plain)
        .eval()
    )
    return {layer: logits[0].double().cpu() for layer, logits in model.to(ids.device).exit_logits(ids).items()}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_modeling_early_exit", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
