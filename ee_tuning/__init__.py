"""Early-exit LLMs on Megatron-core: convert, tune and decode. `python -m ee_tuning --help` starts everything."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ee_tuning.generation.llm import EarlyExitLLM
    from ee_tuning.generation.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["EarlyExitLLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for, so that `import ee_tuning` costs no torch."""
    if name == "EarlyExitLLM":
        from ee_tuning.generation.llm import EarlyExitLLM

        return EarlyExitLLM
    if name == "SamplingParams":
        from ee_tuning.generation.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
