"""Random mixtures of requests against a plain decoder that takes them one at a time."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decoding import policy_for
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder
from random_models import random_llama
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ee_tuning.engine.engine import Engine
from ee_tuning.engine.sequence import Sequence
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy
from ee_tuning.sampling.sampling import draw, request_key, sample_seed

VOCAB, LAYERS, EOS = 101, 6, 100
STEMS = [[(7 * i + 3) % VOCAB for i in range(64)], [(11 * i + 5) % VOCAB for i in range(64)]]


class Subject:
    """A model with exits in float64, and the plain decoder of the same."""

    def __init__(self, folder: Path, architecture: str = "mlp"):
        reference = random_llama(folder / "model", confident=True)
        exits = write_exits(folder / "model", folder / "exits", architecture=architecture)
        self.loaded = loaded_with(folder / "model", exits, dtype="float64")
        self.plain = PlainDecoder(reference, exits, (2, 4), torch.float64)

    def engine(self, **options: Any) -> Engine:
        return Engine(
            self.loaded.model, self.loaded.stages, **{"num_slots": 4, "max_length": 64, "eos_ids": (EOS,), **options}
        )

    def policy(self, **keys: Any) -> Policy:
        return policy_for(self.loaded.model, **keys)

    def wanted(
        self, prompt: list[int], params: SamplingParams, policy: Policy, completion: int = 0
    ) -> tuple[list[int], list[int]]:
        """From the plain decoder and transformers' processors."""
        stop = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else (EOS,))
        key = request_key(params.seed, prompt, completion)

        def choose(logits: torch.Tensor, tokens: list[int]) -> int:
            scores = theirs(params, len(prompt), stop)(
                torch.tensor([tokens]), own_penalties(logits, tokens[len(prompt) :], params)[None]
            )
            return (
                int(scores.argmax())
                if params.is_greedy
                else int(draw(scores.softmax(-1), [sample_seed(key, len(tokens))]))
            )

        return self.plain.decode(
            prompt,
            min(params.max_tokens, 64 - len(prompt)),
            dict(policy.thresholds),
            policy.measure,
            choose,
            policy.fixed_exit,
            stop,
        )


def own_penalties(logits: torch.Tensor, said: list[int], params: SamplingParams) -> torch.Tensor:
    """What transformers has no processor for; it commutes with a bias, and tests do not give it beside a repetition
    penalty.
    """
    counts = torch.bincount(torch.tensor(said, dtype=torch.long), minlength=VOCAB)
    return logits - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts


def theirs(params: SamplingParams, num_prompt_tokens: int, stop: frozenset[int]) -> LogitsProcessorList:
    """transformers' processors for the same wishes, in its order."""
    made = LogitsProcessorList()
    if params.logit_bias:
        made.append(SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens and stop:
        made.append(MinNewTokensLengthLogitsProcessor(num_prompt_tokens, params.min_tokens, sorted(stop)))
    if not params.is_greedy:
        made.append(TemperatureLogitsWarper(params.temperature))
        made.extend([TopKLogitsWarper(params.top_k)] if params.top_k else [])
        made.extend([TopPLogitsWarper(params.top_p)] if params.top_p < 1 else [])
        made.extend([MinPLogitsWarper(params.min_p)] if params.min_p else [])
    return made


def random_request(subject: Subject, rng: random.Random) -> tuple[list[int], SamplingParams, Policy]:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 17, 33, 63]))]
    shared = min(
        rng.choice([0, 0, 10, 16, 20, 32, 40, 60]), len(prompt) - rng.randrange(2)
    )  # tokens that it begins with as others do
    prompt[:shared] = STEMS[rng.randrange(2)][:shared]
    policy = subject.policy(
        **rng.choice(
            [
                {"policy": "full"},
                {"threshold": 0.5},
                {"threshold": rng.random()},
                {"threshold": [rng.random(), rng.random()]},
                {"threshold": rng.random() * 0.6, "measure": "margin"},
                {"threshold": rng.random() * 0.6, "measure": "entropy"},
                {"policy": "fixed", "exit_layer": rng.choice([2, 4])},
                {"policy": "speculative"},
                {"policy": "speculative"},
            ]
        )
    )
    params = SamplingParams(
        max_tokens=rng.choice([rng.randrange(1, 20)] * 3 + [50]), seed=rng.randrange(3), ignore_eos=rng.random() < 0.5
    )
    if rng.random() < 0.5:
        params = replace(
            params,
            temperature=rng.choice([0.7, 1.5]),
            top_k=rng.choice([0, 10]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.05]),
        )
    if rng.random() < 0.3:
        params = replace(
            params, **rng.choice([{"repetition_penalty": 1.3}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}])
        )
    if rng.random() < 0.2:
        params = replace(params, logit_bias={rng.randrange(VOCAB): 3.0, rng.randrange(VOCAB): -4.0})
    if rng.random() < 0.2:
        params = replace(
            params,
            stop_token_ids=(rng.randrange(VOCAB), rng.randrange(VOCAB)),
            min_tokens=rng.randrange(0, params.max_tokens + 1),
        )
    if rng.random() < 0.15:
        params = replace(params, n=2)
    return prompt, params, policy


def mixture(subject: Subject, seed: int) -> Counter[str]:
    """Some requests join an engine of random size at random steps, and some are aborted; each must say what it says
    alone to the plain decoder. Counts what happened.
    """
    rng = random.Random(seed)
    engine = subject.engine(
        num_slots=rng.randrange(1, 5),
        max_pending=rng.choice([1, 3, 16]),
        prefill_chunk=rng.choice([4, 7, 512]),
        cache_tokens=rng.choice([64, 80, 112, 256]),
        reuses_prefixes=rng.random() < 0.8,
    )
    coming = [random_request(subject, rng) for _ in range(rng.randrange(1, 8))]
    jobs: list[tuple[Sequence, list[int]]] = []
    said: dict[int, tuple[list[int], list[int]]] = {}
    seen: Counter[str] = Counter()
    while coming or not engine.is_idle:
        if coming and (engine.is_idle or rng.random() < 0.4):
            prompt, params, policy = coming.pop()
            for sequence in engine.add_request(prompt, params, policy):
                jobs.append((sequence, prompt))
                said[sequence.number] = ([], [])
        for step in engine.step():
            said[step.sequence.number][0].append(step.token_id)
            said[step.sequence.number][1].append(step.exit_layer)
        if jobs and rng.random() < 0.02:
            engine.abort(rng.choice(jobs)[0])
        seen["steps"] += 1
        seen["scattered"] += any(s.slot_mapping is not None and s.slot_mapping.first is None for s in engine.running)
        assert seen["steps"] < 2000, "the engine does not come to an end"
    for sequence, prompt in jobs:
        _check(subject, seed, sequence, prompt, *said[sequence.number])
        seen += Counter(
            {
                "requests": 1,
                "aborted": sequence.finish_reason == "abort",
                "reused": sequence.statistics.num_reused,
                "put back": sequence.was_preempted,
            }
        )
    assert engine.cache.pool.num_free == engine.cache.pool.num_blocks, "memory was lost"
    return seen


def _check(
    subject: Subject, seed: int, sequence: Sequence, prompt: list[int], tokens: list[int], layers: list[int]
) -> None:
    wanted, left = subject.wanted(prompt, sequence.params, sequence.policy, sequence.completion)
    about = (seed, prompt, sequence.params, sequence.policy)
    assert sequence.output == tokens, about
    if sequence.finish_reason == "abort":
        wanted, left = wanted[: len(tokens)], left[: len(tokens)]
    assert tokens == wanted, about
    assert layers == left or sequence.policy.drafts_at, about
