"""Log-probabilities of given continuations under a policy, from whole sequences at once (`EarlyExitLLM.score`).

Every position is teacher-forced: it has the distribution of the exit at which its token would leave, of the final head
where it leaves at none. In decoding the first token of a completion is the final head's, because reading the prompt
takes all layers anyway; here it may leave like all others, because answers of one token would otherwise say nothing
about exits. A token that a shortlisted exit can not predict gets an equal share of "any other token" there.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.config.generation import Measure
from ee_tuning.errors import InputError
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.parallel.shortlist import token_confidences, token_likeliest, token_log_probabilities, token_top1
from ee_tuning.parallel.stage_link import StageLink
from ee_tuning.parallel.vocab import VocabShard
from ee_tuning.sampling.policy import Policy
from ee_tuning.storage.non_finite import no_numbers

# s sequence · b rows of a pass · p policies · h hidden · v/tp this rank's shard of the vocabulary · n positions that
# are scored · k likeliest tokens that are returned

CHUNK = 128
"""Positions whose logits exist at a time."""
PASS_TOKENS = 2048
"""Tokens of a pass, padding included; more where one row has more."""

TokenPair = tuple[list[int], list[int]]
"""Token ids of a context, and of its continuation."""
Encode = Callable[[str, bool], list[int]]
"""(text, whether special tokens begin it) -> its token ids, at least one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of a continuation, token by token."""

    token_ids: list[int]
    logprobs: list[float]
    """The log-probability of each token, in nats."""
    is_greedy: list[bool]
    """Whether each token was the likeliest one in the distribution that it was looked up in."""
    exit_layers: list[int]
    """The layer whose head gave each token's distribution; the number of layers where its position did not
    leave early.
    """
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    """The likeliest ids at each token with their log-probabilities, if requested."""

    @property
    def logprob(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(self.logprobs)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A sequence that is read once, and the positions to be scored in it."""

    tokens: list[int]
    asked: list[tuple[int, int]]
    """(place in the sequence, token after it)."""
    answers: list[int]
    """The place of each of `asked` among all answers."""


def token_pairs(model: EarlyExitModel, encode: Encode, pairs: Iterable[tuple[str, str] | TokenPair]) -> list[TokenPair]:
    """Returns the token ids of each pair. Contexts are cut from the left to the model's positions, as in
    lm-evaluation-harness.

    Raises InputError where either part is empty, a continuation alone is too long, or a token is not of the vocabulary.
    """
    return [_checked(model, *_encoded(encode, *pair)) for pair in pairs]


def _encoded(encode: Encode, context: str | list[int], continuation: str | list[int]) -> TokenPair:
    """Tokenizes both texts as one, and cuts at the end of the first. Spaces there belong to the second, as tokenizers
    expect.
    """
    if not (isinstance(context, str) and isinstance(continuation, str)):
        return list(context), list(continuation)  # type: ignore[arg-type]
    kept = context.rstrip()
    before, after = encode(kept, True), context[len(kept) :] + continuation
    if not after:
        return before, []
    # One token may hold the end of the first and all of the second.
    return before, (encode(kept + after, True)[len(before) :] if kept else []) or encode(after, False)


def _checked(model: EarlyExitModel, context: list[int], continuation: list[int]) -> TokenPair:
    size, positions = model.config.vocab_size, model.plan.max_length
    for name, ids in (("context", context), ("continuation", continuation)):
        if not ids:
            raise InputError(f"the {name} of a pair to score must hold at least one token, got none")
        if not all(isinstance(token, int) and 0 <= token < size for token in ids):
            raise InputError(f"token ids must be integers in 0..{size - 1}, got {ids!r:.60} as a {name} to score")
    if len(continuation) > positions:
        raise InputError(
            f"a continuation to score must have at most the {positions} tokens that the model has positions for, got "
            f"{len(continuation)}; cut it into parts"
        )
    return context[-(positions + 1 - len(continuation)) :], continuation


def score(model: EarlyExitModel, pairs: Sequence[TokenPair], policy: Policy, max_rows: int) -> list[Score]:
    """Scores each of `pairs` (`token_pairs`), in passes of at most `max_rows` rows. All ranks of the replica call it.

    Raises InputError, on all ranks, where logits are not finite.
    """
    return score_by(model, pairs, [policy], max_rows)[0]


def score_by(
    model: EarlyExitModel, pairs: Sequence[TokenPair], policies: Sequence[Policy], max_rows: int, num_top: int = 0
) -> list[list[Score]]:
    """Scores the pairs under each policy, like `score`. Layers and exits run once for all policies. Scores include the
    `num_top` likeliest tokens at each position.
    """
    num_top = min(num_top, model.config.vocab_size)
    ends = list(itertools.accumulate((len(continuation) for _, continuation in pairs), initial=0))
    answers = torch.zeros(len(policies), ends[-1], 3 + 2 * num_top, dtype=torch.float64)
    scorer, batches = _Scorer(model, policies, num_top), list(_batches(_rows(pairs, ends), max_rows))
    with torch.inference_mode():
        for batch in batches:
            scorer.read(batch, answers)
        scorer.link.finish()
    if model.topology.pp > 1:  # each answer comes from one stage and is zero on the others
        dist.all_reduce(answers, group=model.topology.pp_control)
    layers, logprobs = answers[..., 0], answers[..., 1]
    if bool((broken := logprobs.isnan()).any()):
        raise no_numbers(f"the logits behind layer {int(layers[broken][0])}", model.plan.dtype)
    return [_scores(pairs, found) for found in answers]


def _scores(pairs: Sequence[TokenPair], answers: Tensor) -> list[Score]:  # [tokens, 3 + 2 k]
    lengths = [len(continuation) for _, continuation in pairs]
    return [
        Score(
            token_ids=continuation,
            logprobs=found[:, 1].tolist(),
            is_greedy=found[:, 2].bool().tolist(),
            exit_layers=found[:, 0].int().tolist(),
            top_logprobs=_top_logprobs(found[:, 3:]),
        )
        for (_, continuation), found in zip(pairs, answers.split(lengths), strict=True)
    ]


def _top_logprobs(found: Tensor) -> list[dict[int, float]]:  # [tokens, 2 k]: ids, then their log-probabilities
    if not found.shape[1]:
        return []
    ids, logprobs = found.chunk(2, dim=1)
    return [dict(zip(*each, strict=True)) for each in zip(ids.long().tolist(), logprobs.tolist(), strict=True)]


def _rows(pairs: Sequence[TokenPair], ends: list[int]) -> list[_Row]:
    """Returns the rows, longest first, so that a lack of memory shows at once. Pairs that differ only in their last
    token share a row.
    """
    rows: dict[tuple[int, ...], _Row] = {}
    for (context, continuation), first in zip(pairs, ends, strict=False):
        tokens = [*context, *continuation][:-1]
        row = rows.setdefault(tuple(tokens), _Row(tokens, [], []))
        row.asked.extend(enumerate(continuation, len(context) - 1))
        row.answers.extend(range(first, first + len(continuation)))
    return sorted(rows.values(), key=lambda row: -len(row.tokens))


def _batches(rows: list[_Row], max_rows: int) -> Iterator[list[_Row]]:
    first = 0
    while first < len(rows):
        count = max(1, min(max_rows, PASS_TOKENS // len(rows[first].tokens)))
        yield rows[first : first + count]
        first += count


class _Scorer:
    """Passes through this stage, for scoring."""

    def __init__(self, model: EarlyExitModel, policies: Sequence[Policy], num_top: int):
        self.model, self.policies, self.topology, self.link = model, policies, model.topology, StageLink(model.topology)
        self._num_top = num_top
        plan, last = model.plan, model.config.num_layers
        self._through = max(last if policy.fixed_exit is None else policy.fixed_exit for policy in policies)
        """Deepest layer that any policy needs."""
        self._asked: dict[int, dict[int, float | None]] = {}
        """Exits of this stage, shallow to deep -> index of each policy that asks the exit -> the confidence at which a
        position leaves, or None where every position does.
        """
        for place, policy in enumerate(policies):
            asked = dict(policy.thresholds) if policy.fixed_exit is None else {policy.fixed_exit: None}
            for layer, threshold in asked.items():
                if plan.first_layer <= layer <= plan.last_layer:
                    self._asked.setdefault(layer, {})[place] = threshold
        self._asked = dict(sorted(self._asked.items()))
        self._ask_final = [
            place for place, policy in enumerate(policies) if policy.fixed_exit is None and plan.last_layer == last
        ]

    def read(self, rows: list[_Row], answers: Tensor) -> None:
        """Runs rows through this stage, and writes the answers that are found here."""
        if self.model.plan.first_layer > self._through:
            return
        length, width, device = len(rows[0].tokens), self.model.config.hidden_size, self.topology.device
        # Positions of row r are those r, b + r, 2 b + r, … of hidden states [s, b, h].
        places = torch.tensor([at * len(rows) + r for r, row in enumerate(rows) for at, _ in row.asked], device=device)
        labels = torch.tensor([label for row in rows for _, label in row.asked], device=device)
        if self.topology.is_first_stage:
            tokens = torch.tensor([row.tokens + [0] * (length - len(row.tokens)) for row in rows], device=device)
            hidden = self.model.embed(tokens)
            remaining = torch.ones(len(self.policies), len(places), dtype=torch.bool, device=device)
        else:
            dtype = self.model.plan.dtype
            hidden = self.link.receive(length * len(rows), width, dtype).view(length, len(rows), width)
            remaining = self.link.receive(len(places), len(self.policies), dtype).T > 0
        hidden, inputs = self.model.run_layers(hidden, through=self._through)
        found = torch.zeros(len(self.policies), len(places), answers.shape[-1], dtype=torch.float64, device=device)
        self._ask(hidden, inputs, places, labels, remaining, found)
        answers[:, torch.tensor([place for row in rows for place in row.answers])] = found.cpu()
        if self.model.plan.last_layer < self._through:
            self.link.send(hidden.flatten(0, 1))
            self.link.send(remaining.T.to(hidden.dtype).contiguous())

    def _ask(
        self,
        hidden: Tensor,  # [s, b, h]
        inputs: dict[int, ExitInput],
        places: Tensor,  # [n] int64
        labels: Tensor,  # [n] int64
        remaining: Tensor,  # [p, n] bool
        found: Tensor,  # [p, n, 3 + 2 k] float64
    ) -> None:
        """Asks the exits of this stage, shallow to deep, about the positions that have not left under all policies.
        Positions that leave are cleared in `remaining`.
        """
        for layer, thresholds in self._asked.items():
            if not len(active := remaining[list(thresholds)].any(0).nonzero()[:, 0]):
                continue
            measures = sorted(
                {self.policies[place].measure for place, threshold in thresholds.items() if threshold is not None}
            )
            scores = self._ask_exit(layer, measures, inputs[layer], places[active], labels[active])
            for place, threshold in thresholds.items():
                leaves = remaining[place, active]
                if threshold is not None:
                    leaves = leaves & (scores[:, 2 + measures.index(self.policies[place].measure)] >= threshold)
                self._leave(place, layer, active[leaves], scores[leaves], remaining, found)
        if self._ask_final and len(active := remaining[self._ask_final].any(0).nonzero()[:, 0]):
            states = self.model.final_hidden(hidden.flatten(0, 1)[places[active]])
            scores = self._read(states, self.model.backbone.output_layer.weight, self.model.vocab, labels[active], ())
            for place in self._ask_final:
                leaves = remaining[place, active]
                self._leave(place, self.model.config.num_layers, active[leaves], scores[leaves], remaining, found)

    def _leave(
        self,
        policy: int,
        layer: int,
        where: Tensor,  # [m] int64: those of the n positions that leave
        scores: Tensor,  # [m, 2 + measures + 2 k]
        remaining: Tensor,  # [p, n] bool
        found: Tensor,  # [p, n, 3 + 2 k] float64
    ) -> None:
        """Writes the scores of positions that leave at this layer under a policy."""
        found[policy, where, 0] = layer
        found[policy, where, 1:3] = scores[:, :2]
        found[policy, where, 3:] = scores[:, scores.shape[1] - 2 * self._num_top :]
        remaining[policy, where] = False

    def _ask_exit(
        self, layer: int, measures: Sequence[Measure], inputs: ExitInput, places: Tensor, labels: Tensor
    ) -> Tensor:
        head, vocab = self.model.exit_head(layer), self.model.exit_vocab
        if head.own_layer is None:
            return head(
                inputs.tokens(places), lambda states, weight: self._read(states, weight, vocab, labels, measures)
            )
        # A head with its own layer attends over whole sequences.
        return head(
            inputs, lambda states, weight: self._read(states.flatten(0, 1)[places], weight, vocab, labels, measures)
        )

    def _read(
        self,
        hidden: Tensor,  # [n, h]
        weight: Tensor,  # [rows of `vocab`, h]
        vocab: VocabShard,
        labels: Tensor,  # [n] int64
        measures: Sequence[Measure],
    ) -> Tensor:  # [n, 2 + measures + 2 k]
        """Returns the label's log-probability, whether it is the likeliest token, the confidence by each measure, the
        likeliest ids and their log-probabilities; float64.
        """
        width = 2 + len(measures) + 2 * self._num_top
        scores = torch.zeros(len(labels), width, dtype=torch.float64, device=hidden.device)
        for part, states, wanted in zip(scores.split(CHUNK), hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            logits = F.linear(states, weight)
            part[:, 0] = token_log_probabilities(logits, wanted, vocab)
            part[:, 1] = token_top1(logits, vocab).token_ids == wanted
            for column, measure in enumerate(measures, 2):
                part[:, column] = token_confidences(logits, vocab, measure)
            if self._num_top:
                ids, logprobs = token_likeliest(logits, vocab, self._num_top)
                part[:, 2 + len(measures) :] = torch.cat((ids.double(), logprobs.double()), dim=1)
        return scores
