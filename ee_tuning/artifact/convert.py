"""`ee-tuning convert`: creates initialized exit heads for a backbone, which is read by slices and stays unchanged.

Runs in any number of processes, at any TP × PP. Each file is made by one rank, block by block, so the bytes written are
always the same.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ee_tuning.artifact.begun_exits import shown
from ee_tuning.artifact.ee_llm import EELLMExits
from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.artifact.exit_heads import check_output, save_exit_heads, write_exit_heads
from ee_tuning.artifact.exit_init import InitialExits
from ee_tuning.checkpoint.fingerprint import fingerprint, model_shape
from ee_tuning.checkpoint.formats import BackboneSource, OpenModel, check_model, open_model
from ee_tuning.checkpoint.gguf_file import is_gguf
from ee_tuning.checkpoint.legacy import LegacyReader
from ee_tuning.checkpoint.model_card import architecture_text, init_text, vocab_text
from ee_tuning.checkpoint.names import embedding_name
from ee_tuning.config import Architecture, Config, ExitsSection
from ee_tuning.errors import InputError
from ee_tuning.model.draft_spec import draft_spec
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.model.fit import Fit
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel
from ee_tuning.storage.apart import check_apart
from ee_tuning.storage.owner import owned

MakeFit = Callable[[Topology], Fit]
"""Fits exits. All ranks call it."""
ListTokens = Callable[[Topology], ListedTokens | None]
"""Chooses the exits' shortlist, before they are fitted. All ranks call it."""


def convert(
    config: Config,
    output: Path,
    *,
    overwrite: bool = False,
    make_fit: MakeFit | None = None,
    list_tokens: ListTokens | None = None,
) -> None:
    """Writes the artifact that `config.exits` describes to `output`, and prints a summary and the next command.

    `make_fit` is required where exits.init is fitted, `list_tokens` where exits.output_vocab asks for a shortlist.
    Raises InputError where the model, the exits, the layout or `output` can not be used; nothing is left behind then.
    """
    opened = open_model(config.model)
    with opened.source:
        _check(config, opened.config, opened.source)  # before the processes meet, so that a mistake is reported at once
        topology = init_parallel(config.parallel)
        exits = _write(config, opened, output, topology, overwrite, make_fit, list_tokens)
    if topology.is_logging_rank:
        print_summary(config, exits, output)
    destroy_parallel()


def write_initial_exits(
    config: Config,
    output: Path,
    topology: Topology,
    *,
    overwrite: bool = False,
    make_fit: MakeFit | None = None,
    list_tokens: ListTokens | None = None,
) -> ExitHeadsConfig:
    """Does the work of `convert` in a world that exists, and returns what was written. All ranks call it.

    Prints nothing where there is no terminal.
    """
    opened = open_model(config.model)
    with opened.source:
        _check(config, opened.config, opened.source)
        return _write(config, opened, output, topology, overwrite, make_fit, list_tokens)


def _write(
    config: Config,
    opened: OpenModel,
    output: Path,
    topology: Topology,
    overwrite: bool,
    make_fit: MakeFit | None,
    list_tokens: ListTokens | None,
) -> ExitHeadsConfig:
    reader, model = opened.source, opened.config
    on_first_rank(topology, lambda: check_apart(output, (config.model.path, config.data.tokenizer)))
    with owned(output, topology):
        on_first_rank(topology, lambda: check_output(output, overwrite))
        check_model(reader, model, topology, verifies=config.exits.verify)
        if _wants_found(reader, config):
            return _write_found(
                EELLMExits(reader, model, model_name(reader.folder)), output, topology, overwrite=overwrite
            )
        on_first_rank(topology, lambda: reader.check_complete(model))
        listed = list_tokens(topology) if list_tokens else None
        exits = on_first_rank(topology, lambda: initial_exits_config(config, model, reader, listed))
        fit = make_fit(topology) if make_fit else None
        assert (fit is None) == (exits.init != "fitted")
        exits = dataclasses.replace(exits, fitted=fit.record if fit else None)
        initial = InitialExits(exits, reader, model, fit.maps if fit else None, fit.other if fit else None)
        write_exit_heads(output, exits, model, initial.blocks, topology, overwrite=overwrite)
    return exits


def copied_tensors(config: Config, exits: ExitHeadsConfig, topology: Topology) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of `exits`, copied from the job's model with its adapter, on rank 0; nothing on others."""
    if topology.rank:
        return
    reader, model, _ = open_model(config.model)
    with reader:
        initial = InitialExits(exits, reader, model)
        for name in initial.shapes:
            yield name, initial.full(name)


def initial_exits_config(
    config: Config, model: ModelConfig, reader: BackboneSource, listed: ListedTokens | None = None
) -> ExitHeadsConfig:
    """Returns the config of the exits that this conversion makes, with the shortlist `listed`.

    Raises InputError where the weights do not match the model's shape, or the exits would be empty.
    """
    reader.check_complete(model)
    return described_exits(
        config.exits,
        model,
        name=model_name(reader.folder),
        dtype=reader.dtype(embedding_name(model)),
        fingerprint=fingerprint(reader, model),
        listed=listed,
    )


def described_exits(
    section: ExitsSection,
    model: ModelConfig,
    *,
    name: str,
    dtype: torch.dtype,
    fingerprint: str,
    listed: ListedTokens | None = None,
) -> ExitHeadsConfig:
    """Returns the config of the exits that `section` describes, for the model called `name`.

    Raises InputError where they are not possible.
    """
    return ExitHeadsConfig(
        **described_heads(section, layers := section.layers(model.num_layers), model),
        exit_layers=layers,
        output="tied" if section.output == "shared" else section.output,
        dtype=str(dtype).removeprefix("torch."),
        model_name=name,
        model_shape=model_shape(model),
        model_fingerprint=fingerprint,
        output_vocab=listed.record if listed else None,
        token_ids=listed.token_ids if listed else (),
    )


def described_heads(section: ExitsSection, layers: tuple[int, ...], model: ModelConfig) -> dict[str, Any]:
    """Returns the keys of ExitHeadsConfig for exits after `layers`: architectures, the adapters' rank, initialization.

    The default architecture is `mlp`, or `norm` for a model with experts, which has no MLP to copy, and for exits that
    share the final head. Raises InputError where the section names neither one architecture nor one per exit, or an
    impossible one.
    """
    has_norms = model.num_experts or section.output == "shared"
    words: tuple[Architecture, ...] = section.architecture or ("norm" if has_norms else "mlp",)
    if "mlp" in words and model.num_experts:
        raise InputError(
            f"exits.architecture must not be mlp for a model with experts, got mlp: a layer has {model.num_experts} MLPs, and "
            "the head would be none of them; use --architecture norm"
        )
    if len(words) not in (1, len(layers)):
        raise InputError(
            f"exits.architecture must be one word or one per exit, {len(layers)} for the exits {','.join(map(str, layers))}, "
            f"got {len(words)}: {','.join(words)}"
        )
    if "eagle3" in words:
        return _described_drafter(section, layers, model)
    if "embedding" in words and section.output == "tied" and section.init != "fitted":
        raise InputError(
            "exits.output must be untied for the architecture embedding, got tied, which leaves nothing to tune; "
            "use untied, or the architecture norm"
        )
    if section.output == "shared":
        _check_shared(section)
    if "adapter" in words and section.adapter_rank < 1:
        raise InputError(f"exits.adapter_rank must be at least 1, got {section.adapter_rank}")
    check_output_vocab(section, model.vocab_size)
    each = words * len(layers) if len(words) == 1 else words
    adds_linear = section.init == "fitted" and section.output == "tied"
    return {
        "architecture": each,
        "init": section.init_of_convert,
        "adds_linear": tuple(
            layer for layer, word in zip(layers, each, strict=True) if adds_linear and word != "linear"
        ),
        "adapter_rank": section.adapter_rank if "adapter" in words else None,
        "seed": section.seed if section.init == "random" or "adapter" in words else None,
    }


def _check_shared(section: ExitsSection) -> None:
    if set(section.architecture) - {"norm"} or section.init not in ("auto", "copy") or section.output_vocab:
        raise InputError(
            "exits.output = shared is for exits that are the model's own norm and output matrix, without an architecture, an "
            f"initialization or a shortlist, got architecture {','.join(section.architecture) or 'norm'}, init {section.init} "
            f"and output_vocab {section.output_vocab}; leave them out"
        )


def _described_drafter(section: ExitsSection, layers: tuple[int, ...], model: ModelConfig) -> dict[str, Any]:
    if set(section.architecture) != {"eagle3"} or layers != (model.num_layers,):
        raise InputError(
            "exits.architecture = eagle3 must stand alone, at the end of the model, got "
            f"{','.join(section.architecture)} after layers {','.join(map(str, layers))}; leave --exit-layers out; the layers "
            "whose states it reads are --aux-layers"
        )
    if section.init == "fitted":
        raise InputError("exits.init must be copy or random for the architecture eagle3, got fitted")
    check_output_vocab(section, model.vocab_size)
    return {
        "architecture": ("eagle3",),
        "init": section.init_of_convert,
        "adapter_rank": None,
        "seed": section.seed,
        "draft": draft_spec(model, section.aux_layers),
    }


def check_output_vocab(section: ExitsSection, vocab_size: int) -> None:
    """Raises InputError where a vocabulary of this size does not allow the shortlist that `section` asks for."""
    asked = section.output_vocab
    if isinstance(asked, int) and not 0 <= asked < vocab_size:
        raise InputError(
            f"exits.output_vocab must be at least 1 and below the model's vocabulary of {vocab_size}, got {asked}; 0 is all "
            "of it"
        )
    if asked and section.output == "tied":
        raise InputError(
            f"exits.output must be untied with exits.output_vocab = {asked}, got tied: the backbone's output matrix has all "
            "rows; leave one of them out"
        )


def model_name(folder: Path) -> str:
    """Returns the model's name for messages: that of its file or folder, org/name of a snapshot in Hugging Face's
    cache, or that of the run for an iteration.
    """
    folder = folder.resolve()
    if folder.name == "release" or folder.name.startswith("iter_"):
        return folder.parent.name
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    if is_gguf(folder):
        return folder.stem
    return folder.name


def _wants_found(reader: BackboneSource, config: Config) -> TypeGuard[LegacyReader]:
    """Whether to write the checkpoint's own exits, EE-LLM's: the job asks for no others."""
    return isinstance(reader, LegacyReader) and not config.exits.exit_layers


def _write_found(found: EELLMExits, output: Path, topology: Topology, *, overwrite: bool) -> ExitHeadsConfig:
    found.reader.check_complete(found.config)
    own = found.exits.exit_layers[topology.rank :: topology.world_size]
    save_exit_heads(output, found.exits, found.config, found.tensors(own), topology, overwrite=overwrite)
    return found.exits


def _check(config: Config, model: ModelConfig, reader: BackboneSource) -> None:
    if _wants_found(reader, config):
        for key in ("architecture", "aux_layers", "adapter_rank", "init", "output", "output_vocab"):
            if (asked := getattr(config.exits, key)) != getattr(ExitsSection(), key):
                raise InputError(
                    f"exits.{key} = {shown(asked)} is for new exits, and the checkpoint's own are asked for; give --exit-layers, or "
                    f"leave exits.{key} out"
                )
        EELLMExits(reader, model, "")
        return
    if config.exits.output == "shared":
        raise InputError(
            "exits.output = shared is for `tune`, which trains the model's own head at each exit; use tied with the "
            "architecture norm"
        )
    model.check_layout(config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size)
    layers = config.exits.layers(model.num_layers)
    model.check_exit_layers(layers)
    described_heads(config.exits, layers, model)


def print_summary(config: Config, exits: ExitHeadsConfig, output: Path) -> None:
    """Prints what was written to `output`, and the next command."""
    size = sum(path.stat().st_size for path in output.iterdir())
    layers = "layer" + "s" * (len(exits.exit_layers) > 1) + " " + ", ".join(map(str, exits.exit_layers))
    print(
        f"wrote {output}: exit heads {architecture_text(exits.architecture)} after {layers} of {exits.model_name}, "
        f"{init_text(exits.init, exits.seed)}, output {exits.output}"
        + vocab_text(exits.output_vocab, drafts=exits.draft is not None)
    )
    print(
        f"{size:,} bytes in {exits.dtype}; bound to fingerprint {exits.model_fingerprint[:16]}…; the model itself is as it was"
    )
    shape = f" --config {quote(config.model.config)}" if config.model.config else ""
    print(
        f"next: ee-tuning tune --model {quote(config.model.path)}{shape} --exits {quote(str(output))} --data YOUR_TEXTS "
        "--output runs/tune"
    )
