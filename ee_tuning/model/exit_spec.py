"""What an exit is: where it sits, which architecture its head has, which tokens it says. Data alone."""

from dataclasses import dataclass

from ee_tuning.config import Architecture


@dataclass(frozen=True, kw_only=True)
class ListedTokens:
    """The shortlist of a model's exits."""

    token_ids: tuple[int, ...]
    """Increasing."""
    num_tokens: int
    """Tokens of a text that were counted to choose them."""
    num_listed: int
    """Those of them that are listed."""

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
    """Whether a linear map stands before the output matrix that the architecture does not bring: what a least-squares
    fit leaves of a head whose output matrix is not its own.
    """

    output_vocab: int = 0
    """Tokens that the head says, with an output matrix of its own for these and any other token; 0 for the whole
    vocabulary.
    """

    def output_rows(self, vocab_size: int) -> int:
        """Rows of its output matrix, padding left out."""
        return self.output_vocab + 1 if self.output_vocab else vocab_size

    @property
    def has_linear(self) -> bool:
        """Whether a linear map [h, h] with a bias stands before the output matrix."""
        return self.adds_linear or self.architecture == "linear"

    @property
    def linear_rank(self) -> int:
        """Rank of the linear map, I + B A, where it is of low rank: an `adapter`'s, a head that is to stay small; 0
        where it is [h, h].
        """
        return self.adapter_rank if self.adds_linear and self.architecture == "adapter" else 0
