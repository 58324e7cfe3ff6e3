"""Compares an exported Hugging Face folder with this project's engine: largest logit difference per exit, on real
text.
"""

import dataclasses
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from ee_tuning.artifact.load import LoadedModel, load_for_generation
from ee_tuning.artifact.stage_plans import compute_dtype
from ee_tuning.config import Config, ParallelSection, replace
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_of
from ee_tuning.errors import InputError
from ee_tuning.export.companions import MODELLING
from ee_tuning.export.export_huggingface import early_exit_class
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.shortlist import token_logits
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel

MAX_TOKENS = 512


def check_export(config: Config, output: Path, text: str, tolerance: float = 1e-3) -> bool:
    """Prints a line per exit and one for the final head. Returns whether all differences are within `tolerance`.

    Both sides compute in model.dtype. Raises InputError where the text can not be tokenized.
    """
    topology, loaded, ids = load_to_compare(config, text)
    ours = exit_logits(loaded, ids)
    theirs = _exported_logits(output, loaded.model.config, ids.to(topology.device), compute_dtype(config, topology))
    destroy_parallel()
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    is_close = True
    for layer in sorted(ours):
        name = "the model's own head" if layer == loaded.model.config.num_layers else f"exit after layer {layer}"
        is_close = _print_difference(name, ours[layer], theirs[layer], tolerance) and is_close
    return is_close


def check_plain_exit(
    config: Config, output: Path, layer: int, text: str, tolerance: float = 1e-4, *, is_exact: bool = True
) -> bool:
    """Prints how far the logits of an exit's plain folder, computed by transformers, are from the exit's own. Returns
    whether they are within `tolerance`. Both sides compute in float32.

    A linear map folded into an output matrix of 16 bits is rounded with it: the tolerance is then at least one step of
    that dtype at the largest logit. Where the fold is not exact, the share of equal tokens is printed instead, which
    fails nothing. Raises as `check_export`.
    """
    config = replace(config, model={"dtype": "float32"})
    topology, loaded, ids = load_to_compare(config, text)
    ours = exit_logits(loaded, ids)[layer]
    assert loaded.exits is not None
    head = next(head for head in loaded.exits.heads if head.layer == layer)
    if head.has_linear:
        tolerance = max(tolerance, torch.finfo(loaded.exits.torch_dtype).eps * ours.abs().max().item())
    theirs = _plain_logits(output, loaded.model.config, ids.to(topology.device))
    destroy_parallel()
    if not is_exact:
        same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
        print(
            f"exit after layer {layer}: {same:.1%} of {ids.shape[1]} tokens are the exit's, with its bias folded nearly"
        )
        return True
    return _print_difference(f"exit after layer {layer}", ours, theirs, tolerance)


def load_to_compare(config: Config, text: str, max_tokens: int = MAX_TOKENS) -> tuple[Topology, LoadedModel, Tensor]:
    """Loads the model in one process, for any layout of the job, and tokenizes the text."""
    token_ids = check_long_enough(config, text)
    config = dataclasses.replace(config, parallel=ParallelSection())
    topology = init_parallel(config.parallel)
    loaded = load_for_generation(config, topology)
    limit = min(max_tokens, loaded.model.config.max_position_embeddings)
    return topology, loaded, torch.tensor([token_ids[:limit]])


def check_long_enough(config: Config, text: str) -> list[int]:
    """Returns the tokens of a text. Raises InputError where there are fewer than two, or no tokenizer."""
    tokenizer = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
    token_ids: list[int] = tokenizer(text)["input_ids"]
    if len(token_ids) < 2:
        raise InputError(f"--text must have at least two tokens, got {len(token_ids)}; give another one")
    return token_ids


def _print_difference(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> bool:  # [s, v], [s, v]
    # Where a shortlisted exit can not predict a token, both logits are -inf, whose difference would be NaN.
    difference = torch.where(ours == theirs, 0.0, ours - theirs).abs().max().item()
    is_within = difference <= tolerance  # false for NaN, too
    print(
        f"{name}: largest logit difference {difference:.2e} over {ours.shape[0]} tokens"
        + ("" if is_within else f", above the tolerance of {tolerance:g}")
    )
    return is_within


@torch.no_grad()
def exit_logits(loaded: LoadedModel, ids: Tensor) -> dict[int, Tensor]:  # [1, s] -> layer -> [s, v]
    """Returns the float64 logits of every exit of a model in one stage and, under the number of layers, of its final
    head.
    """
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
    model = (
        getattr(module, early_exit_class(config))
        .from_pretrained(folder, dtype=dtype, trust_remote_code=False, **_plain_experts(config))
        .eval()
    )
    return {layer: logits[0].double().cpu() for layer, logits in model.to(ids.device).exit_logits(ids).items()}


@torch.no_grad()
def _plain_logits(folder: Path, config: ModelConfig, ids: Tensor) -> Tensor:  # [1, s] -> [s, v]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, **_plain_experts(config)
    )
    logits: Tensor = model.eval().to(ids.device)(ids).logits[0]
    return logits.double().cpu()


def _plain_experts(config: ModelConfig) -> dict[str, str]:
    # transformers' default for experts, grouped products, refuses widths that are no multiple of 16 bytes.
    return {"experts_implementation": "eager"} if config.num_experts else {}


def _module(path: Path) -> ModuleType:
    # Python's import would leave a __pycache__ in the folder, which is checked and must hold what its manifest lists.
    module = ModuleType("exported_modeling_early_exit")
    exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    return module
