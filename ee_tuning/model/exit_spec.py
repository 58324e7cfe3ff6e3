"""What an exit is: where it sits, which architecture its head has. Data alone."""
from dataclasses import dataclass

from ee_tuning.config import Architecture


@dataclass(frozen=True, kw_only=True)
class ExitSpec:
    """One exit of a model."""

    layer: int
    """The backbone layer (1-based) that the head follows."""
    architecture: Architecture
    ties_output: bool
    """Whether the head uses the backbone's frozen output matrix."""
    adapter_rank: int = 0
    """Inner width of an `adapter` head."""
    adds_linear: bool = False
    """Whether a linear map stands before the output matrix that the architecture does not bring: what a least-squares fit leaves of a head
    whose output matrix is not its own."""

    @property
    def has_linear(self) -> bool:
        """Whether a linear map [h, h] with a bias stands before the output matrix."""
        return self.adds_linear or self.architecture == "linear"
