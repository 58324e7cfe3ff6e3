"""What an engine that drafts with an exit will accept, told before it runs: from where the exit alone says what the
whole model says.

Under greedy decoding a draft is accepted where it is the token of the whole model and so are all drafts before it in
its round; then the draft model has read the very tokens that were said, and would say the same of them read as a text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.checkpoint.load import LoadedModel
from ee_tuning.parallel.shortlist import token_logits

# s sequence


@dataclass(frozen=True)
class Acceptance:
    """Drafts of a number of rounds, as vLLM counts them."""

    num_rounds: int
    by_position: tuple[int, ...]
    """Accepted drafts at each position of a round."""

    @property
    def length(self) -> float:
        """Mean acceptance length: tokens a round, the whole model's own with them."""
        return 1 + sum(self.by_position) / max(self.num_rounds, 1)

    @property
    def rates(self) -> tuple[float, ...]:
        """The share of rounds whose draft at each position was accepted."""
        return tuple(count / max(self.num_rounds, 1) for count in self.by_position)


def acceptance(answers: Iterable[Sequence[bool]], num_drafts: int) -> Acceptance:
    """What rounds of `num_drafts` drafts bring, by whether each token of each answer is the exit's too. The first token
    of an answer comes with its prompt, before any draft.
    """
    rounds, accepted = 0, [0] * num_drafts
    for agrees in answers:
        place = 1
        while place < len(agrees):
            rounds += 1
            run = 0
            while run < num_drafts and place + run < len(agrees) and agrees[place + run]:
                accepted[run] += 1
                run += 1
            place += run + 1
    return Acceptance(rounds, tuple(accepted))


@torch.no_grad()
def agreement(loaded: LoadedModel, layer: int, prompt: Sequence[int], answer: Sequence[int]) -> list[bool]:
    """Whether the exit after `layer` of a model in one stage says each token of `answer`, where all tokens before it
    are given.
    """
    model = loaded.model
    ids = torch.tensor([[*prompt, *answer]], device=model.topology.device)
    _, inputs = model.run_layers(model.embed(ids))
    logits: Tensor = token_logits(model.exit_head(layer)(inputs[layer], F.linear), model.exit_vocab)
    said = logits[len(prompt) - 1 : -1, 0].argmax(-1)
    agrees: list[bool] = (said == ids[0, len(prompt) :]).tolist()
    return agrees
