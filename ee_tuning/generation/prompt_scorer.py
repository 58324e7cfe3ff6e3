"""Log-probabilities of prompts, pass by pass, so that an engine can take steps in between."""

from dataclasses import dataclass

from ee_tuning.errors import InputError
from ee_tuning.generation.scoring import Score, score_by
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.sampling.policy import Policy


@dataclass(frozen=True)
class _Prompt:
    index: int
    token_ids: tuple[int, ...]
    policy: Policy
    num_top: int
    priority: int


class PromptScorer:
    """A queue of prompts to score. Every rank of a replica makes the same calls."""

    def __init__(self, model: EarlyExitModel, *, max_rows: int, max_tokens: int):
        """A pass has at most `max_rows` prompts and `max_tokens` tokens, padding included, or one longer prompt."""
        self._model, self._max_rows, self._max_tokens = model, max_rows, max_tokens
        self._waiting: list[_Prompt] = []

    @property
    def is_idle(self) -> bool:
        """Whether the queue is empty."""
        return not self._waiting

    def add(self, index: int, token_ids: tuple[int, ...], policy: Policy, num_top: int, priority: int = 0) -> None:
        """Queues a prompt; its score is returned with `index`. Prompts of a lower `priority` come first."""
        self._waiting.append(_Prompt(index, token_ids, policy, num_top, priority))
        self._waiting.sort(key=lambda prompt: prompt.priority)

    def abort(self, index: int) -> None:
        """Removes a prompt from the queue."""
        self._waiting = [prompt for prompt in self._waiting if prompt.index != index]

    def step(self) -> list[tuple[int, Score | InputError]]:
        """Scores the first prompt, and others with the same policy that fit in the pass.

        Returns the index of each with the score of its tokens after the first, or an error where logits are not finite.
        """
        batch = self._next_batch()
        pairs = [(list(prompt.token_ids[:1]), list(prompt.token_ids[1:])) for prompt in batch]
        scored = [pair for pair in pairs if pair[1]]
        policy, num_top = batch[0].policy, batch[0].num_top
        found: list[Score | InputError] = []
        try:
            if scored:
                found += score_by(self._model, scored, [policy], self._max_rows, num_top)[0]
        except InputError as error:
            found += [error] * len(scored)
        answers = iter(found)
        nothing = Score(token_ids=[], logprobs=[], is_greedy=[], exit_layers=[])
        return [
            (prompt.index, next(answers) if pair[1] else nothing) for prompt, pair in zip(batch, pairs, strict=True)
        ]

    def _next_batch(self) -> list[_Prompt]:
        batch, rest, longest = list[_Prompt](), list[_Prompt](), 0
        for prompt in self._waiting:
            length = max(longest, len(prompt.token_ids))
            fits = len(batch) < self._max_rows and length * (len(batch) + 1) <= self._max_tokens
            if not batch or (fits and (prompt.policy, prompt.num_top) == (batch[0].policy, batch[0].num_top)):
                batch.append(prompt)
                longest = length
            else:
                rest.append(prompt)
        self._waiting = rest
        return batch
