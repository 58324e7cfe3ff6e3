"""The one line that a user gets for a mistake, and a file that would run a command."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from ee_tuning.errors import InputError


def refusal(action: Callable[..., Any], *args: Any) -> str:
    """The message of the InputError that `action(*args)` must end with."""
    with pytest.raises(InputError) as caught:
        action(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Hostile:
    """An object whose pickle runs a command where it is read: a file `hostile` in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)
