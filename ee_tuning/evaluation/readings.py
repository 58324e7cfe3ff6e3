"""What each way to leave did to each prompt: what is kept while more is measured, and what all figures are made of."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from ee_tuning.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """One prompt by one way to leave."""

    task: str
    item: int
    """Place of the prompt in the task."""
    point: str
    scores: dict[str, float]
    """The metric's, and others that go with it. Of perplexity the negative log-likelihood of the answer, nats."""
    weight: float = 1.0
    """What a score counts for: 1 a prompt; of perplexity the tokens of the answer."""
    exits: dict[int, int]
    """Layer -> tokens that left there; the number of layers for those that did not leave early."""
    num_agreed: int | None = None
    """Tokens that the full model says, too, after the same text before them; None where nothing is said."""
    is_same: bool | None = None
    """Whether all of it is what full depth says to the prompt, or chooses; None where it does neither."""
    group: str = ""
    """Prompts that were timed together have one."""
    seconds: float | None = None
    """What the group took, the reading of its prompts included; None where time says nothing."""
    text: str = ""

    @property
    def num_tokens(self) -> int:
        """New tokens of a completion, or tokens of the texts that were asked about."""
        return sum(self.exits.values())

    def in_group(self, group: str) -> "ItemResult":
        """This one, timed in `group`."""
        return replace(self, group=group)

    def tree(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}

    @classmethod
    def of_tree(cls, tree: dict[str, Any]) -> "ItemResult":
        """What `tree` made. Raises InputError on anything else."""
        try:
            return cls(**{**tree, "exits": {int(layer): count for layer, count in tree["exits"].items()}})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"a record of an evaluation is damaged: {error}") from error
