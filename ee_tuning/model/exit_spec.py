"""The specification of an exit: layer, architecture, vocabulary. Data only."""

from dataclasses import dataclass

from ee_tuning.config import Architecture
from ee_tuning.model.draft_spec import DraftSpec


@dataclass(frozen=True, kw_only=True)
class ListedTokens:
    """The shortlist of a model's exits."""

    token_ids: tuple[int, ...]
    """Increasing."""
    num_tokens: int
    """Number of tokens of a text that were counted to choose them."""
    num_listed: int
    """Number of these tokens that are listed."""

    @property
    def record(self) -> dict[str, float]:
        """{"size", "tokens", "share"}, for the artifact."""
        return {
            "size": len(self.token_ids),
            "tokens": self.num_tokens,
            "share": round(self.num_listed / max(self.num_tokens, 1), 6),
        }


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
    """Whether a least-squares fit added a linear map before the output matrix, which is not the head's own."""

    output_vocab: int = 0
    """Tokens in the head's own output matrix, any other token being one more class except for `eagle3`; 0 for the whole
    vocabulary.
    """

    draft: DraftSpec | None = None
    """Description of an `eagle3` head; None for all others."""

    def output_rows(self, vocab_size: int) -> int:
        """Returns the rows of its output matrix, without padding."""
        return self.output_vocab + (self.draft is None) if self.output_vocab else vocab_size

    @property
    def has_linear(self) -> bool:
        """Whether a linear map [h, h] with a bias precedes the output matrix."""
        return self.adds_linear or self.architecture == "linear"

    @property
    def linear_rank(self) -> int:
        """Rank of a linear map I + B A (of an `adapter`, whose head must stay small); 0 for a full [h, h]."""
        return self.adapter_rank if self.adds_linear and self.architecture == "adapter" else 0
