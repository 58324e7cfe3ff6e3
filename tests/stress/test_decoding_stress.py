"""A little of what `make stress` does to the decoder for long."""

from pathlib import Path

from decoding_stress import stress_growth, stress_speculation
from stages_stress import stress_stages
from world import World


def test_drafts_change_no_token_of_held_out_prompts(tmp_path: Path) -> None:
    """A token that depends on what was drafted, which random models' drafts, mostly wrong, hardly show."""
    assert stress_speculation(8, 0, tmp_path).failures == []


def test_stages_say_what_one_process_says(world: World, tmp_path: Path) -> None:
    """What a single layout, policy or size of memory hides."""
    assert stress_stages(6, 0, tmp_path, world).failures == []


def test_nothing_grows_with_the_tokens(tmp_path: Path) -> None:
    """A list that every token or request lengthens, a cache larger than its formula."""
    assert stress_growth(1000, 0, tmp_path).failures == []
