"""Several documents in one row of tokens: which tokens may see each other, and at which position each of them stands.

Every stage makes this from the micro-batch of its own loader; it never travels with the hidden states.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ee_tuning.parallel.fake_tensor import is_fake
from ee_tuning.parallel.pinned_staging import to_device

# b micro-batch · s sequence · d width of a head


@dataclass(frozen=True, kw_only=True)
class PackedDocuments:
    """The documents of a micro-batch, on the device that computes."""

    ids: Tensor | None
    """[b, s] int64: grows by one where a document begins; tokens see those of their own id. None: they see all before
    them.
    """
    positions: Tensor | None
    """[b, s] int64: where each token stands in its document. None: where it stands in its row."""
    starts: Tensor | None
    """[documents + 1] int32: first token of each document, rows laid one after the other, and the number of tokens;
    with `ids`.
    """
    longest: int
    """Tokens of the longest document; with `ids`."""

    @classmethod
    def of(cls, ids: Tensor | None, positions: Tensor | None, device: torch.device) -> "PackedDocuments | None":
        """The documents of the loader's tensors on the CPU; None where documents are not told apart."""
        if ids is None and positions is None:
            return None
        starts, longest = None, 0
        if ids is not None:  # here, on the CPU: on the device, `longest` would have to be waited for
            starts, longest = _bounds(ids)
            starts = to_device(starts.int(), device)
        ids, positions = (None if each is None else to_device(each, device) for each in (ids, positions))
        return cls(ids=ids, positions=positions, starts=starts, longest=longest)

    @cached_property
    def mask(self) -> Tensor | None:
        """[b, 1, s, s] bool: whether a token (row) sees another (column). One for all layers. None where all before it
        are seen.
        """
        if self.ids is None:
            return None
        return (self.ids[:, :, None] == self.ids[:, None, :]).tril_()[:, None]


def _bounds(ids: Tensor) -> tuple[Tensor, int]:  # [b, s] -> [documents + 1], tokens of the longest
    if is_fake(ids):  # a document in each row: so attention takes most
        return torch.arange(0, ids.numel() + 1, ids.shape[1]), ids.shape[1]
    is_start = torch.ones_like(ids, dtype=torch.bool)
    is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    bounds = torch.cat((is_start.flatten().nonzero().flatten(), torch.tensor([ids.numel()])))
    return bounds, int(bounds.diff().max())


def rotations(
    angles: Tensor, length: int, documents: PackedDocuments | None
) -> Tensor:  # [positions, d] -> [s, 1 or b, 1, d]
    """Rotary angles of whole sequences, as Megatron's layers take them."""
    if documents is None or documents.positions is None:
        return angles[:length, None, None]
    return angles[documents.positions.t()][:, :, None]
