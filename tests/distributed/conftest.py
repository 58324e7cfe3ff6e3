"""The one world of four processes that all distributed tests share."""
from collections.abc import Iterator

import pytest
from world import World


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """`world.run(function, *args)` calls a module-level function on four ranks and returns their results by rank."""
    shared = World()
    yield shared
    shared.stop()
