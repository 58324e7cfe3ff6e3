"""The exit that a budget chose. Times are measured, and may be others in the next process, so outputs keep it."""

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
