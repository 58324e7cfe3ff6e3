"""Results by prompt and policy, which are stored while the evaluation runs. All figures are computed from them."""

from dataclasses import asdict, dataclass
from typing import Any

from ee_tuning.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """One prompt under one policy."""

    task: str
    item: int
    """Index of the prompt in the task."""
    point: str
    scores: dict[str, float]
    """Score of the metric, and related ones; for perplexity the negative log-likelihood of the answer in nats."""
    weight: float = 1.0
    """Weight of the score: 1 per prompt; for perplexity the number of tokens of the answer."""
    exits: dict[int, int]
    """Layer -> tokens that left there; the number of layers for those that did not leave early."""
    num_agreed: int | None = None
    """Number of tokens that the full model predicts, too, after the same prefix; None where nothing is generated."""
    is_same: bool | None = None
    """Whether the completion, or choice, is that of full depth; None where there is neither."""
    group: str = ""
    """The same for prompts that were timed together."""
    seconds: float | None = None
    """Seconds of the group, prefill included; None where times mean nothing."""
    text: str = ""

    @property
    def num_tokens(self) -> int:
        """Number of new tokens of a completion, or of tokens of the given texts."""
        return sum(self.exits.values())

    def tree(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}

    @classmethod
    def of_tree(cls, tree: dict[str, Any]) -> "ItemResult":
        """The inverse of `tree`. Raises InputError on anything else."""
        try:
            return cls(**{**tree, "exits": {int(layer): count for layer, count in tree["exits"].items()}})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"a record of an evaluation is damaged: {error}") from error
