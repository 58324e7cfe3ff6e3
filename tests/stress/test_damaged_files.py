"""A few of the mutations that `make stress` makes by the thousand."""

from pathlib import Path

from checkpoint_stress import stress_checkpoints
from safetensors_stress import stress_safetensors


def test_damaged_safetensors_are_refused_or_harmless(tmp_path: Path) -> None:
    """A model loaded wrong in silence, a traceback, a hang, or all of the memory, for a file that was damaged or made
    to do harm.
    """
    assert stress_safetensors(240, 0, tmp_path).failures == []


def test_damaged_checkpoints_are_refused_or_harmless(tmp_path: Path) -> None:
    """The same, of Megatron's checkpoints; and a pickle that runs."""
    assert stress_checkpoints(60, 0, tmp_path).failures == []
