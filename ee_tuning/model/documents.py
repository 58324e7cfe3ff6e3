"""Several documents in one row of tokens: attention within documents, and positions within documents.

Every stage derives this from its own loader's micro-batch; it is never sent with the hidden states.
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
    """The documents of a micro-batch, on the computing device."""

    ids: Tensor | None
    """[b, s] int64, growing by one where a document begins; tokens attend within their id. None: they attend to all
    earlier tokens.
    """
    positions: Tensor | None
    """[b, s] int64: each token's position in its document. None: its position in the row."""
    starts: Tensor | None
    """[documents + 1] int32: first token of each document, with rows concatenated, and the number of tokens. Present
    with `ids`.
    """
    longest: int
    """Number of tokens of the longest document. Present with `ids`."""

    @classmethod
    def of(cls, ids: Tensor | None, positions: Tensor | None, device: torch.device) -> "PackedDocuments | None":
        """Builds the documents from the loader's tensors on the CPU, or None where documents are not separated."""
        if ids is None and positions is None:
            return None
        starts, longest = None, 0
        if ids is not None:  # on the CPU: on the device, reading `longest` would wait for it
            starts, longest = _bounds(ids)
            starts = to_device(starts.int(), device)
        ids, positions = (None if each is None else to_device(each, device) for each in (ids, positions))
        return cls(ids=ids, positions=positions, starts=starts, longest=longest)

    @cached_property
    def mask(self) -> Tensor | None:
        """Returns [b, 1, s, s] bool: whether a token (row) attends to another (column). The same for all layers. None
        if all tokens attend to all earlier ones.
        """
        if self.ids is None:
            return None
        return (self.ids[:, :, None] == self.ids[:, None, :]).tril_()[:, None]


def _bounds(ids: Tensor) -> tuple[Tensor, int]:  # [b, s] -> [documents + 1], tokens of the longest
    if is_fake(ids):  # one document per row, the most expensive case of attention
        return torch.arange(0, ids.numel() + 1, ids.shape[1]), ids.shape[1]
    is_start = torch.ones_like(ids, dtype=torch.bool)
    is_start[:, 1:] = ids[:, 1:] != ids[:, :-1]
    bounds = torch.cat((is_start.flatten().nonzero().flatten(), torch.tensor([ids.numel()])))
    return bounds, int(bounds.diff().max())


def rotations(
    angles: Tensor, length: int, documents: PackedDocuments | None
) -> Tensor:  # [positions, d] -> [s, 1 or b, 1, d]
    """Returns rotary angles of whole sequences, in the form that Megatron's layers expect."""
    if documents is None or documents.positions is None:
        return angles[:length, None, None]
    return angles[documents.positions.t()][:, :, None]
