"""Exits placed by their number alone."""

from pathlib import Path

import pytest

from ee_tuning.config import ExitsSection, load_config, save_config
from ee_tuning.config.placement import AutoLayers, evenly_along
from ee_tuning.errors import InputError


@pytest.mark.parametrize(
    ("num_layers", "num_exits", "wanted"),
    [
        (32, 7, (4, 8, 12, 16, 20, 24, 28)),
        (32, 3, (8, 16, 24)),
        (40, 7, (5, 10, 15, 20, 25, 30, 35)),
        (6, 2, (2, 4)),
        (6, 1, (3,)),
        (6, 5, (1, 2, 3, 4, 5)),
        (6, 6, (1, 2, 3, 4, 5, 6)),
        (1, 1, (1,)),
    ],
)
def test_exits_cut_the_depth_into_equal_parts(num_layers: int, num_exits: int, wanted: tuple[int, ...]) -> None:
    """An exit after the last layer, which saves nothing, in the place of one that does; two exits after one layer."""
    assert evenly_along(range(1, num_layers + 1), num_exits) == wanted
    assert load_config(None, {"exits.exit_layers": f"auto:{num_exits}"}).exits.layers(num_layers) == wanted


def test_exits_lie_closer_where_the_way_is_longer() -> None:
    """A profile that is not looked at; layers chosen twice where one layer is most of the way."""
    assert evenly_along([1, 2, 3, 4, 14, 24], 3) == (3, 4, 5)
    assert evenly_along([10, 11, 12, 13, 14, 15], 2) == (1, 2)
    assert evenly_along([0, 0, 0, 1], 3) == (1, 2, 3)


@pytest.mark.parametrize("word", ["auto", "auto:0", "auto:2:depth", "auto:-1", "auto:2:profile:3"])
def test_a_word_that_is_no_placement_is_refused(word: str) -> None:
    """Read as `auto:1`, or as a list of layers, it would put exits where nobody wanted them."""
    with pytest.raises(InputError, match=r"exits\.exit_layers must be layer numbers, auto:N or auto:N:profile"):
        load_config(None, {"exits.exit_layers": [word]})


def test_more_exits_than_layers_are_refused() -> None:
    """Fewer exits than asked for, in silence."""
    with pytest.raises(InputError, match="at most 6"):
        ExitsSection(exit_layers=AutoLayers(7)).layers(6)
    with pytest.raises(InputError, match="ee-tuning profile --num-exits 2"):
        ExitsSection(exit_layers=AutoLayers(2, True)).layers(6)


def test_a_placement_is_kept_in_the_job_s_file(tmp_path: Path) -> None:
    """A resolved config that can not be read back."""
    config = load_config(None, {"exits.exit_layers": "auto:8:profile"})
    save_config(config, tmp_path / "job.yaml")
    assert load_config(tmp_path / "job.yaml") == config and config.exits.exit_layers == AutoLayers(8, by_profile=True)
