"""Options of a call over a job's `generation` section, and the parts of them that the engine and its sampler take."""

import dataclasses
from typing import Any

from ee_tuning.config import GenerationSection, load_config
from ee_tuning.config.generation import without_overruled
from ee_tuning.errors import InputError
from ee_tuning.sampling.exit_fusion import ExitFusion
from ee_tuning.sampling.params import SamplingParams


def engine_settings(options: GenerationSection) -> dict[str, Any]:
    """Returns the section's keys that an engine is created with."""
    return {
        "max_pending": options.max_pending,
        "prefill_chunk": options.prefill_chunk,
        "cache_tokens": options.cache_tokens,
        "reuses_prefixes": options.reuse_prefixes,
    }


def with_options(defaults: GenerationSection, options: dict[str, Any]) -> GenerationSection:
    """Returns `defaults` with the keys of `options` replaced. A threshold or measure in `options` overrules a
    calibration file in the defaults.
    """
    given = load_config(None, {f"generation.{key}": value for key, value in options.items()}).generation
    kept = without_overruled(vars(defaults), options)
    return GenerationSection(**{**kept, **{key: getattr(given, key) for key in options}})


def checked_options(defaults: GenerationSection, options: dict[str, Any]) -> GenerationSection:
    """Does the work of `with_options`. Raises InputError on sizes that no engine can have."""
    resolved = with_options(defaults, options)
    check_sizes(resolved)
    return resolved


def check_sizes(options: GenerationSection) -> None:
    """Raises InputError on sizes that no engine can have."""
    for name in ("max_pending", "prefill_chunk", "max_batch_size", "cache_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"generation.{name} must be at least 1, got {value}")


def params_of(generation: GenerationSection) -> SamplingParams:
    """Returns the section's sampling parameters. Their values are checked when a request is added."""
    same = {field.name for field in dataclasses.fields(SamplingParams)} & {
        field.name for field in dataclasses.fields(GenerationSection)
    }
    return SamplingParams(
        max_tokens=generation.max_new_tokens,
        min_tokens=generation.min_new_tokens,
        fusion=ExitFusion.of(generation),
        **{name: getattr(generation, name) for name in same},
    )
