"""Predicts the acceptance of an exit's drafts in an engine, from where the exit agrees with the whole model.

Under greedy decoding a draft is accepted if it and all drafts before it in its round are the whole model's tokens. The
draft model has then read exactly the generated text, so it would predict the same when it reads that text in one pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.parallel.shortlist import token_logits

# s sequence


@dataclass(frozen=True)
class Acceptance:
    """Accepted drafts of a number of rounds, counted as in vLLM."""

    num_rounds: int
    by_position: tuple[int, ...]
    """Number of accepted drafts at each position of a round."""

    @property
    def length(self) -> float:
        """Mean acceptance length: tokens per round, the whole model's own included."""
        return 1 + sum(self.by_position) / max(self.num_rounds, 1)

    @property
    def rates(self) -> tuple[float, ...]:
        """Share of rounds whose draft at each position was accepted."""
        return tuple(count / max(self.num_rounds, 1) for count in self.by_position)


def acceptance(answers: Iterable[Sequence[bool]], num_drafts: int) -> Acceptance:
    """Simulates rounds of `num_drafts` drafts, given whether the exit predicts each token of each answer.

    The first token of an answer comes with its prompt, before any draft.
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
    """Returns whether the exit after `layer` predicts each token of `answer`, given all tokens before it. The model
    must have one stage.
    """
    model = loaded.model
    ids = torch.tensor([[*prompt, *answer]], device=model.topology.device)
    _, inputs = model.run_layers(model.embed(ids))
    logits: Tensor = token_logits(model.exit_head(layer)(inputs[layer], F.linear), model.exit_vocab)
    said = logits[len(prompt) - 1 : -1, 0].argmax(-1)
    agrees: list[bool] = (said == ids[0, len(prompt) :]).tolist()
    return agrees
