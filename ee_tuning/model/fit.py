"""Least-squares fit of an exit's linear map: its states z are regressed on the final ones y, from sums over tokens.

Reduced-rank regression: Izenman, Journal of Multivariate Analysis 5 (1975) 248–264.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# n tokens · h hidden · r rank

RIDGE = 1e-3
"""λ, as a share of the mean diagonal of Σ z zᵀ."""


@dataclass(frozen=True)
class Fit:
    """The result of a fit, for `exits.init: fitted`."""

    maps: dict[int, Tensor]
    """Map of each exit layer, [h, h + 1]: T and, in the last column, b; or, for rank r, [h, 2r + 1]: B, Aᵀ and b of I +
    B A. Empty where a checkpoint holds the heads.
    """
    record: dict[str, float]
    """{"tokens", "ridge"}, for the artifact."""
    other: Tensor | None = None
    """[h]: the row of a shortlist's "any other token", for final states; None without a shortlist."""


class FitSums:
    """Σ z' z'ᵀ and Σ z' yᵀ in float64, where z' is z with a one appended. Of their h + 1 rows, tensor-parallel rank
    `rank` of `size` holds its share.
    """

    def __init__(self, width: int, device: torch.device, rank: int = 0, size: int = 1):
        self._rows = slice((width + 1) * rank // size, (width + 1) * (rank + 1) // size)
        self._sums = torch.zeros(self._rows.stop - self._rows.start, 2 * width + 1, dtype=torch.float64, device=device)

    def add(self, states: Tensor, final: Tensor, counts: Tensor) -> None:  # [n, h], [n, h], [n]
        """Adds the tokens of all tensor-parallel ranks whose `counts` is 1 and not 0."""
        states = torch.cat((states.double(), states.new_ones(len(states), 1, dtype=torch.float64)), dim=1)
        self._sums += (states[:, self._rows] * counts[:, None]).T @ torch.cat((states, final.double()), dim=1)

    def whole(self) -> Tensor:  # [h + 1, 2h + 1], on the CPU
        """Returns all rows, with zeros in those of other ranks."""
        whole = torch.zeros(self._sums.shape[1] // 2 + 1, self._sums.shape[1], dtype=torch.float64)
        whole[self._rows] = self._sums.cpu()
        return whole


def num_columns(width: int, rank: int) -> int:
    """Returns the number of columns of a map of `Fit` for states of size `width`; rank 0 is full rank."""
    return 2 * rank + 1 if rank else width + 1


def solved(sums: Tensor, *, has_bias: bool) -> Tensor:  # [h + 1, 2h + 1] float64 -> [h, h + 1] float64
    """Returns T and, in the last column, b of argmin Σ ‖T z + b − y‖² + λ ‖T‖²; b is 0 without `has_bias`. NaN where
    the sums are not finite.
    """
    size = sums.shape[0] - (not has_bias)
    return _solved(_ridged(sums)[:size, :size], sums[:size, sums.shape[0] :], sums.shape[0])


def solved_of_rank(sums: Tensor, rank: int) -> Tensor:  # [h + 1, 2h + 1] float64 -> [h, 2r + 1] float64
    """Returns B, Aᵀ and b of argmin Σ ‖z + B A z + b − y‖² + λ ‖B A‖², with B A of rank `rank`. NaN where the sums are
    not finite.

    With C and b the full-rank solution, B has the leading eigenvectors of C (Σ (z − z̄) (z − z̄)ᵀ + λ) Cᵀ, and A is Bᵀ
    C.
    """
    width, ridged = sums.shape[0] - 1, _ridged(sums)
    number = sums[width, width]
    of_states = sums[:width, width]
    of_change = sums[width, width + 1 :] - sums[width, :width]
    whole = _solved(ridged, sums[:, width + 1 :] - sums[:, :width], width + 1)[:, :-1]
    found = torch.full((width, num_columns(width, rank)), torch.nan, dtype=torch.float64)
    if not whole.isfinite().all():
        return found
    centred = ridged[:width, :width] - torch.outer(of_states, of_states) / number
    rest = torch.linalg.eigh(whole @ centred @ whole.T).eigenvectors.flip(1)[:, :rank]
    kept = rest.T @ whole
    found.zero_()
    found[:, : rest.shape[1]], found[:, rank : rank + rest.shape[1]] = rest, kept.T
    found[:, -1] = (of_change - rest @ (kept @ of_states)) / number
    return found


def _ridged(sums: Tensor) -> Tensor:  # [h + 1, h + 1]
    gram = sums[:, : sums.shape[0]].clone()
    diagonal = gram.diagonal()[:-1]
    diagonal += RIDGE * diagonal.mean()
    return gram


def _solved(
    gram: Tensor, moments: Tensor, num: int
) -> Tensor:  # [n, n], [n, h] -> [h, num], zeros behind the nth column
    factor, info = torch.linalg.cholesky_ex(gram)
    found = torch.zeros(moments.shape[1], num, dtype=torch.float64)
    found[:, : gram.shape[0]] = torch.cholesky_solve(moments, factor).T if not info else torch.nan
    return found
