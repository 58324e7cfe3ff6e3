"""A linear map for an exit by least squares: its states z are regressed on the final ones y, and of all tokens only sums are kept."""
from dataclasses import dataclass

import torch
from torch import Tensor

# n tokens · h hidden

RIDGE = 1e-3
"""λ, as a share of the mean of the diagonal of Σ z zᵀ."""


@dataclass(frozen=True)
class Fit:
    """What `exits.init: fitted` brings to copied heads."""

    maps: dict[int, Tensor]
    """Map of each exit layer, [h, h + 1]: T and, last, b. None where a checkpoint brings the heads."""
    record: dict[str, float]
    """{"tokens", "ridge"}, for the artifact."""
    other: Tensor | None = None
    """[h]: the row of "any other token" of a shortlist, for final states; None without a shortlist."""


class FitSums:
    """Σ z' z'ᵀ and Σ z' yᵀ in float64, z' being z and a one; of their h + 1 rows those of tensor-parallel rank `rank` among `size`."""

    def __init__(self, width: int, device: torch.device, rank: int = 0, size: int = 1):
        self._rows = slice((width + 1) * rank // size, (width + 1) * (rank + 1) // size)
        self._sums = torch.zeros(self._rows.stop - self._rows.start, 2 * width + 1, dtype=torch.float64, device=device)

    def add(self, states: Tensor, final: Tensor, counts: Tensor) -> None:  # [n, h], [n, h], [n]
        """Tokens, those of all tensor-parallel ranks, of which those count where `counts` is 1 and not 0."""
        states = torch.cat((states.double(), states.new_ones(len(states), 1, dtype=torch.float64)), dim=1)
        self._sums += (states[:, self._rows] * counts[:, None]).T @ torch.cat((states, final.double()), dim=1)

    def whole(self) -> Tensor:  # [h + 1, 2h + 1], on the CPU
        """All rows, zeros where they are another rank's."""
        whole = torch.zeros(self._sums.shape[1] // 2 + 1, self._sums.shape[1], dtype=torch.float64)
        whole[self._rows] = self._sums.cpu()
        return whole


def solved(sums: Tensor, *, has_bias: bool) -> Tensor:  # [h + 1, 2h + 1] float64 -> [h, h + 1] float64
    """T and, last, b of argmin Σ ‖T z + b − y‖² + λ ‖T‖²; b is 0 without `has_bias`. NaN where the sums are not finite."""
    size = sums.shape[0] - (not has_bias)
    gram, moments = sums[:size, :size].clone(), sums[:size, sums.shape[0]:]
    diagonal = gram.diagonal()[:sums.shape[0] - 1]
    diagonal += RIDGE * diagonal.mean()
    factor, info = torch.linalg.cholesky_ex(gram)
    found = torch.zeros(moments.shape[1], sums.shape[0], dtype=torch.float64)
    found[:, :size] = torch.cholesky_solve(moments, factor).T if not info else torch.nan
    return found
