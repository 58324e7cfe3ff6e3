"""Early-exit LLMs on Megatron-core: convert, tune and decode. Start with `python -m ee_tuning --help`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ee_tuning.generation.llm import EarlyExitLLM
    from ee_tuning.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["EarlyExitLLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a name on first access, so that `import ee_tuning` does not import torch."""
    if name == "EarlyExitLLM":
        from ee_tuning.openmp import shorten_spins

        shorten_spins()
        from ee_tuning.generation.llm import EarlyExitLLM

        return EarlyExitLLM
    if name == "SamplingParams":
        from ee_tuning.sampling.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
