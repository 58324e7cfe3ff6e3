"""Costs and gains of early exits: tokens, depth and speed by threshold, against the same engine at full depth."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ee_tuning.config import Config
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.data.loader import validation_batches
from ee_tuning.generation.llm import Completion, EarlyExitLLM
from ee_tuning.losses.loss import token_losses
from ee_tuning.model.documents import PackedDocuments

REPEATS = 3
"""Repetitions per prompt and policy: with a small model, a completion takes no longer than an interruption of the
machine.
"""


@dataclass(frozen=True, kw_only=True)
class ThresholdResult:
    """Decoding at one threshold, over all prompts."""

    threshold: float
    speedup: float
    """Tokens per second ÷ those of full depth on the same prompts in the same run."""
    tokens_per_second: float
    agreement: float
    """Share of tokens that the full model predicts after the same prefix."""
    mean_exit_layer: float
    exit_histogram: dict[int, int]
    """Tokens by the layer at which they left; the number of layers for those that did not leave early."""


def measure_thresholds(
    llm: EarlyExitLLM,
    prompts: list[str],
    thresholds: Iterable[float],
    max_new_tokens: int,
    on_prompt: Callable[[int], None] = lambda done: None,
) -> tuple[list[ThresholdResult], float]:
    """Returns a result per threshold, and full depth's tokens per second. Greedy, one prompt at a time, past end of
    text.

    Every prompt is decoded at full depth and at all thresholds before the next one, several times: a slow moment of the
    machine affects all alike, and the shortest time of a policy counts. The first repetition pays for memory that a
    longer prompt needs.
    """
    thresholds = list(thresholds)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "reuse_prefixes": False,
    }
    ways: list[dict[str, Any]] = [
        {"policy": "full"},
        *({"policy": "threshold", "threshold": threshold} for threshold in thresholds),
    ]
    fastest: list[list[Completion]] = [[] for _ in ways]
    for done, prompt in enumerate(prompts, 1):
        rounds = [[llm.generate([prompt], **way, **options)[0] for way in ways] for _ in range(REPEATS)]
        for completions, completed in zip(fastest, zip(*rounds, strict=True), strict=True):
            completions.append(min(completed, key=lambda completion: completion.seconds))
        on_prompt(done)
    full, *early = fastest
    full_rate = _rate(full)
    return [
        _result(llm, threshold, completed, full_rate) for threshold, completed in zip(thresholds, early, strict=True)
    ], full_rate


def agreement(llm: EarlyExitLLM, completion: Completion) -> float:
    """Returns the share of a completion's tokens that the full model predicts, greedily, after the same prefix."""
    assert llm.engine is not None
    prompt = llm.encode(completion.prompt)
    said = llm.engine.full_model_tokens(prompt + completion.token_ids[:-1])[len(prompt) - 1 :]
    return sum(a == b for a, b in zip(said, completion.token_ids, strict=True)) / len(said)


def final_head_loss(llm: EarlyExitLLM, config: Config) -> float:
    """Returns the full model's mean loss, in nats per token, on the validation data of `tune`: the goal of the exits'
    losses.

    For a single process.
    """
    model, tuning = llm.model, config.tuning
    splits = load_job_samples(config, model.config, needs_validation=True)
    loss_sum = num_tokens = 0.0
    for batch in validation_batches(splits.valid, tuning, dp=1, dp_rank=0):
        documents = PackedDocuments.of(batch.document_ids, batch.position_ids, model.topology.device)
        hidden, _ = model.run_layers(model.embed(batch.tokens.to(model.topology.device), documents), documents)
        labels, mask = batch.labels.to(hidden.device), batch.loss_mask.to(hidden.device)
        losses = token_losses(
            model.final_hidden(hidden),
            model.backbone.output_layer.weight,
            labels,
            vocab=model.vocab,
            chunk_tokens=tuning.loss_chunk_tokens,
        )
        loss_sum += float((losses * mask).sum())
        num_tokens += float(mask.sum())
    return loss_sum / num_tokens


def _rate(completions: list[Completion]) -> float:
    return sum(len(c.token_ids) for c in completions) / sum(c.seconds for c in completions)


def _result(llm: EarlyExitLLM, threshold: float, completions: list[Completion], full_rate: float) -> ThresholdResult:
    layers = [layer for c in completions for layer in c.exit_layers]
    agreed = sum(agreement(llm, c) * len(c.token_ids) for c in completions)
    return ThresholdResult(
        threshold=threshold,
        speedup=_rate(completions) / full_rate,
        tokens_per_second=_rate(completions),
        agreement=agreed / len(layers),
        mean_exit_layer=sum(layers) / len(layers),
        exit_histogram=dict(sorted(Counter(layers).items())),
    )
