"""Engines that take an EAGLE-3 head."""

from typing import get_args

import pytest

from ee_tuning.artifact import eagle3_engines as engines
from ee_tuning.model_config.families import Family


def test_every_family_is_looked_up():
    """A new family that silently has no engine."""
    assert set(engines._ENGINES) == set(get_args(Family))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ("vLLM", "SGLang")),
        ("qwen2", ("vLLM", "SGLang")),
        ("qwen3", ("vLLM",)),
        ("qwen3_moe", ("vLLM",)),
        ("mixtral", ()),
        ("gpt2", ()),
        ("abacus", ()),
    ],
)
def test_engines_are_those_that_load_the_head(family, expected):
    """SGLang named for a head whose class it lacks, and any engine for a model that hands out no states."""
    assert engines.eagle3_engines(family) == expected
