"""Checks that no key that describes new exit heads is without effect: exits are an artifact, or of another kind.

A job file is shared by commands, so the artifact overrules the heads that the file describes. What the command line
describes must be what the artifact holds.
"""

from collections.abc import Collection
from pathlib import Path
from shlex import quote
from typing import Any

from ee_tuning.artifact.exit_config import ExitHeadsConfig, read_exit_config
from ee_tuning.artifact.exit_heads import check_is_artifact
from ee_tuning.config import Config, ExitsSection
from ee_tuning.config.output_vocab import AutoVocab
from ee_tuning.config.placement import AutoLayers
from ee_tuning.errors import InputError

_KEPT = ("path", "verify")
"""Keys of the section that describe no new heads."""


def with_begun_exits(config: Config, given: Collection[str]) -> Config:
    """Returns the job of `tune` or `plan` without the heads that its file describes, where it has an artifact to begin
    with.

    Raises InputError where `given`, the keys of the command line, describe other heads than the artifact holds, or
    heads that nothing makes.
    """
    section = config.exits
    if section.path is None:
        check_new_exits(section, given)
        _check_made(config, given)
        return config
    kept = {key: value for key, value in vars(section).items() if key in _KEPT or f"exits.{key}" in given}
    section = ExitsSection(**kept)
    if "tuning.fit_tokens" in given and config.tuning.fit_tokens:
        raise InputError(_refusal(section, "tuning.fit_tokens", config.tuning.fit_tokens, "are not fitted again"))
    folder = Path(str(section.path))
    check_is_artifact(folder)
    _check_held(section, read_exit_config(folder), given)
    return Config(**{**vars(config), "exits": section})


def check_new_exits(section: ExitsSection, given: Collection[str]) -> None:
    """Raises InputError where keys of the command line are for another kind of new heads than `section` describes."""
    for key, word in (("adapter_rank", "adapter"), ("aux_layers", "eagle3")):
        is_other = getattr(section, key) != getattr(ExitsSection(), key)
        if is_other and f"exits.{key}" in given and word not in section.architecture:
            raise InputError(
                f"exits.{key} is for the architecture {word}, got {','.join(section.architecture) or 'the default one'}; leave it "
                f"out, or give --architecture {word}"
            )


def shown(value: Any) -> Any:
    """Returns a value of the section as the command line takes it: the items of a tuple joined by commas."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _check_made(config: Config, given: Collection[str]) -> None:
    """Checks keys of the command line for exits that the job makes."""
    section = config.exits
    has_exits = section.exit_layers or section.drafts
    described = [
        key for key in given if key.startswith("exits.") and key.removeprefix("exits.") not in (*_KEPT, "exit_layers")
    ]
    if described and not has_exits and config.tuning.trained.has_backbone:
        raise InputError(
            f"{described[0]} describes exits, and exits.exit_layers names none; give --exit-layers, or leave it out to train "
            "the model alone"
        )
    if "tuning.fit_tokens" in given and config.tuning.fit_tokens and section.init_of_tune != "fitted":
        raise InputError(
            f"tuning.fit_tokens is for exits.init = fitted, got {config.tuning.fit_tokens} for "
            f"{f'exits.init = {section.init_of_tune}' if has_exits else 'no exits'}; leave one of them out"
        )


def _check_held(section: ExitsSection, held: ExitHeadsConfig, given: Collection[str]) -> None:
    for key, asked in vars(section).items():
        if key in _KEPT or f"exits.{key}" not in given:
            continue
        if has := _other(key, asked, held):
            raise InputError(_refusal(section, f"exits.{key}", asked, has) + _longer(section, key, held))


def _other(key: str, asked: Any, held: ExitHeadsConfig) -> str | None:
    """Returns what the exits have instead of `asked`, or None where they have just that."""
    listed, layers = len(held.token_ids), ",".join(map(str, held.exit_layers))
    match key:
        case "exit_layers":
            wanted = asked.num_exits if isinstance(asked, AutoLayers) else tuple(asked)
            found = len(held.exit_layers) if isinstance(asked, AutoLayers) else held.exit_layers
            return None if wanted == found or not asked else f"are after layers {layers}"
        case "architecture":
            each = tuple(asked) * len(held.exit_layers) if len(asked) == 1 else tuple(asked)
            return None if each == held.architecture or not each else f"are {','.join(held.architecture)}"
        case "aux_layers":
            read = held.draft.aux_layers if held.draft else ()
            return None if tuple(asked) == read or not asked else f"read {','.join(map(str, read)) or 'no such layers'}"
        case "adapter_rank":
            return None if asked == held.adapter_rank else f"have {held.adapter_rank or 'no adapter'}"
        case "init":
            return None if asked in ("auto", held.init) else f"began as {held.init}"
        case "output":
            return None if asked == held.output else f"are {held.output}"
        case "output_vocab":
            is_same = bool(listed) if isinstance(asked, AutoVocab) else asked == listed
            return None if is_same else f"have {f'{listed} tokens' if listed else 'the whole vocabulary'}"
        case "seed":
            return None if held.seed in (None, asked) else f"have {held.seed}"
    return "are placed already"  # profile_text


def _refusal(section: ExitsSection, key: str, asked: Any, has: str) -> str:
    return (
        f"{key} = {shown(asked)} is for new exits, and those in exits.path = {section.path} {has}; leave it out, or make new ones "
        "without --exits"
    )


def _longer(section: ExitsSection, key: str, held: ExitHeadsConfig) -> str:
    """The command for a longer list, where that is what is asked for."""
    asked = section.output_vocab
    if key != "output_vocab" or not isinstance(asked, int) or not 0 < len(held.token_ids) < asked:
        return ""
    return f"; ee-tuning convert --widen {quote(str(section.path))} --output-vocab {asked} makes their list longer"
