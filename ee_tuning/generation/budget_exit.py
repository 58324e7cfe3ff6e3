"""Exits that budgets chose. Times are measured, and may be others in the next process, so outputs keep the choice."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class BudgetExit(NamedTuple):
    """The choice of generation.budget."""

    share: float
    """generation.budget."""
    exit_layer: int

    def tree(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return self._asdict()

    @classmethod
    def of_tree(cls, tree: Any) -> "BudgetExit | None":
        """Returns the choice in the data of `tree`, or None where there is none."""
        if not isinstance(tree, dict):
            return None
        share, layer = tree.get("share"), tree.get("exit_layer")
        return cls(share, layer) if isinstance(share, float) and isinstance(layer, int) else None


def budgets_tree(chosen: Mapping[float, int]) -> dict[str, int]:
    """Returns the exit of each budget as plain data for JSON, such as {"0.5": 8}."""
    return {str(budget): layer for budget, layer in chosen.items()}


def budgets_of_tree(tree: Any) -> dict[float, int]:
    """The inverse of `budgets_tree`. Empty where `tree` is something else."""
    try:
        return {float(budget): int(layer) for budget, layer in tree.items()}
    except (AttributeError, TypeError, ValueError):
        return {}
