"""Stage 3: tuning of eight `mlp` exits of a random 7B in bfloat16, made on the device, compared with the rate of the
matrix units and with `plan`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.artifact.shapes import shape_sources
from ee_tuning.artifact.stage_plans import plan_tuning
from ee_tuning.config import Config, load_config
from ee_tuning.data.tokens import DocumentRules, PackedSamples, Splits
from ee_tuning.losses.loss import linear_loss
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.quantized_linear import quantized_weights
from ee_tuning.parallel.relay import Relay
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.vocab import VocabShard
from ee_tuning.planning.dry_run import profile_ranks
from ee_tuning.tuning.stage_forward import StageForward
from ee_tuning.tuning.tuner import Tuner
from gpu_stages.bench import ROOT, SHIPPED, Bench
from gpu_stages.checks import Check, Finding, at_least, at_most

RATE_GOAL = 0.50
"""Share of the measured matrix rate to reach; the next goal is 0.55."""
DOCUMENT = 300
"""Tokens of each document, where documents are separated."""


def planned(keys: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of `plan` for the job: peak bytes, and operations of a micro-batch. Run it in a process
    without a world.
    """
    (found,) = profile_ranks(load_config(None, keys), 1)
    return {"bytes": sum(found.memory.values()), "flops": found.layer_flops + found.head_flops}


def tokens_per_second(bench: Bench, name: str, changes: dict[str, Any]) -> Iterator[Finding]:
    """Times optimizer steps of the real tuner, and measures its memory."""
    keys = {**_job(bench), **changes}
    asked = bench.without_gpu(planned, keys)
    if bench.is_inline:
        asked.result()  # finish it now: a fake world can not be beside the world of the run
    config, ceiling = load_config(None, keys), bench.matrix_rate
    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.seconds(_step(config, bench.topology), repeats=3)
    peak = torch.cuda.max_memory_allocated() if bench.is_cuda else 0
    tuning, plan = config.tuning, asked.result()
    rate = plan["flops"] * tuning.global_batch_size / tuning.micro_batch_size / seconds
    yield Finding(what=f"tune, {name}", value=tuning.global_batch_size * tuning.seq_length / seconds, unit="tokens/s")
    yield at_least(f"tune, {name}, of the matrix rate", rate / ceiling, RATE_GOAL)
    if bench.is_cuda:
        yield Finding(what=f"tune, {name}, peak memory", value=peak / 1e9, unit="GB")
        yield at_most(f"tune, {name}, memory apart from the plan's", abs(peak / plan["bytes"] - 1), 0.05)


def chunked_loss(bench: Bench) -> Iterator[Finding]:
    """Compares time and memory of the loss by chunks with those of all logits at once, forward and backward, for a
    small and a large vocabulary.
    """
    tokens, width = (64, 32) if bench.is_tiny else (8192, 4096)
    for vocabulary in (100, 300) if bench.is_tiny else (32000, 128256):
        plain, plain_bytes = _loss(bench, tokens, width, vocabulary, None)
        yield Finding(what=f"plain loss over {vocabulary}", value=1000 * plain, unit="ms")
        for chunk in (16,) if bench.is_tiny else (1024, 4096):
            seconds, peak = _loss(bench, tokens, width, vocabulary, chunk)
            yield at_most(f"loss over {vocabulary} by {chunk} ÷ plain, time", seconds / plain, 1.2)
            if bench.is_cuda:
                yield Finding(what=f"loss over {vocabulary} by {chunk} ÷ plain, memory", value=peak / plain_bytes)


def _loss(bench: Bench, tokens: int, width: int, vocabulary: int, chunk: int | None) -> tuple[float, float]:
    """Returns seconds, and bytes beside the inputs."""
    draw: dict[str, Any] = {"device": bench.device, "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, 1, width, **draw).requires_grad_()
    weight = torch.empty(vocabulary, width, **draw).normal_(std=0.02).requires_grad_()
    labels, mask = (
        torch.randint(vocabulary, (tokens, 1), device=bench.device),
        torch.ones(tokens, 1, device=bench.device),
    )
    vocab = VocabShard(vocabulary, 0, vocabulary, None, 1)

    def loss() -> Tensor:
        if chunk is None:
            return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return linear_loss(hidden, weight, labels, mask, vocab=vocab, chunk_tokens=chunk).loss

    def step() -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if bench.is_cuda else 0
    seconds = bench.seconds(step, repeats=5)
    return seconds, (torch.cuda.max_memory_allocated() if bench.is_cuda else 1) - held


def _job(bench: Bench) -> dict[str, Any]:
    """Returns the keys of the config. Only the example's shape is read, and no weights."""
    model, layers = (SHIPPED, [2, 4]) if bench.is_tiny else (ROOT / "examples" / "llama-2-7b", list(range(4, 33, 4)))
    return {
        "model.path": str(model),
        "model.dtype": "bfloat16",
        "exits.exit_layers": layers,
        "exits.architecture": "mlp",
        "exits.output": "untied",
        "tuning.seq_length": 32 if bench.is_tiny else 2048,
        "tuning.micro_batch_size": 4,
        "tuning.global_batch_size": 8,
        "tuning.eval_iters": 0,
        "tuning.run_folder": str(bench.scratch / "run"),
    }


def _step(config: Config, topology: Topology) -> Any:
    """Returns a function that takes an optimizer step."""
    sources = shape_sources(config)
    assert sources.exits is not None
    plans = plan_tuning(config, sources.config, sources.exits, topology)
    model = EarlyExitModel(sources.config, topology, plans[topology.stage])
    _draw(model)
    loaded = LoadedModel(model, [(each.first_layer, each.last_layer) for each in plans], sources.exits)
    tuner = Tuner(loaded, _samples(config, sources.config.vocab_size), config, topology)
    tuning = config.tuning
    shape, _ = model.relay_shapes(tuning.seq_length, tuning.micro_batch_size)
    relay = Relay(topology, shape, model.plan.dtype)
    return partial(tuner.dry_step, StageForward(model, relay, topology, tuner.teacher_channel))


@torch.no_grad()
def _draw(model: EarlyExitModel) -> None:
    """Draws random weights, quantized ones included."""
    for parameter in model.parameters():
        _ = parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.02)
    for _, linear in quantized_weights(model.backbone):
        linear.quantize_(torch.empty(linear.shape, dtype=linear.dtype, device=model.topology.device).normal_(std=0.02))


def _samples(config: Config, vocab_size: int) -> Splits:
    length = config.tuning.seq_length
    stream = np.random.RandomState(0).randint(0, vocab_size, 64 * length + 1).astype(np.int32)
    rules = DocumentRules.of(config.data)
    starts = (
        np.arange(0, len(stream), DOCUMENT if length > DOCUMENT else length // 3)
        if rules.reset_attention_mask
        else None
    )
    return Splits(train=PackedSamples(stream, length, starts=starts, rules=rules), valid=None)


def memory_copies(bench: Bench) -> Iterator[Finding]:
    """Times copies between pinned memory and the device, which checkpoints and several processes on one card need."""
    if not bench.is_cuda:
        yield Finding(what="copies from pinned memory", value="no GPU")
        return
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=bench.device)
    for name, target, source in (("to the device", there, host), ("to the host", host, there)):
        seconds = bench.seconds(partial(target.copy_, source, non_blocking=True))
        yield Finding(what=f"pinned memory {name}", value=len(host) / seconds / 1e9, unit="GB/s")


_PACKED = {"data.reset_attention_mask": True, "data.reset_position_ids": True, "data.eod_mask_loss": True}

CHECKS = (
    Check("plain", 45, partial(tokens_per_second, name="native", changes={})),
    Check("documents packed", 30, partial(tokens_per_second, name="documents apart", changes=_PACKED)),
    Check(
        "loss chunks of 4096",
        30,
        partial(tokens_per_second, name="loss by 4096", changes={"tuning.loss_chunk_tokens": 4096}),
    ),
    Check("chunked loss", 20, chunked_loss),
    Check("int8", 45, partial(tokens_per_second, name="int8", changes={"tuning.backbone_weights": "int8"})),
    Check("nf4", 45, partial(tokens_per_second, name="nf4", changes={"tuning.backbone_weights": "nf4"})),
    Check("pinned memory", 5, memory_copies),
)
