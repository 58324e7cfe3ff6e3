"""The cost of depth alone: the engine's own layers and heads called one after the other, without the rest of the
engine.

From their times come the speed-ups that decoding is held against: `fixed`, by the layers that run and the head behind
them, and `threshold`, by the layers that each token ran through and every head that was asked about it, also without
success.
"""

import time
from collections import Counter
from dataclasses import dataclass

import torch

from ee_tuning import EarlyExitLLM
from ee_tuning.decoding.attention_metadata import AttentionMetadata
from ee_tuning.decoding.decode_head import DecodeExitHead
from ee_tuning.decoding.layer_stack import LayerStack
from ee_tuning.engine.engine import Engine
from ee_tuning.model.exit_head import ExitInput

SAMPLED_STEPS = 32
"""Decode steps that are timed, evenly over a generation."""


@dataclass(frozen=True)
class BareTimes:
    """Seconds of the parts of a generation: segment i ends at exit i, the last one at the last layer."""

    prefill: list[float]
    """Seconds of the prompts, per segment."""
    decode: list[float]
    """Seconds of a step of one token per sequence, per segment."""
    heads: list[float]
    """Seconds of each exit's head for the tokens of a step; the final head's come last."""
    num_steps: int

    def full(self) -> float:
        """Returns the seconds of a generation at full depth."""
        return sum(self.prefill) + self.heads[-1] + self.num_steps * (sum(self.decode) + self.heads[-1])

    def fixed(self, exit_index: int) -> float:
        """Returns the seconds of a generation whose tokens all leave at an exit."""
        upto = exit_index + 1
        return (
            sum(self.prefill[:upto])
            + self.heads[exit_index]
            + self.num_steps * (sum(self.decode[:upto]) + self.heads[exit_index])
        )

    def implied(self, exit_layers: list[int], places: list[int]) -> float:
        """Returns the seconds of a generation whose tokens left at `exit_layers`, with exits behind the layers
        `places`: each decoded token costs its layers, and all heads up to the one that it left at, as its share of a
        full step.
        """
        total, left = sum(self.prefill) + self.heads[-1], Counter(exit_layers)
        num_tokens = sum(left.values())
        for layer, count in left.items():
            index = places.index(layer) if layer in places else len(places)
            one = sum(self.decode[: index + 1]) + sum(self.heads[: index + 1])
            total += self.num_steps * one * count / num_tokens
        return total


@torch.inference_mode()
def bare_times(llm: EarlyExitLLM, prompt_length: int, new_tokens: int, num_rows: int) -> BareTimes:
    """Times a batch of `num_rows` prompts of one length."""
    engine = Engine(llm.model, llm.stages, num_slots=num_rows, max_length=prompt_length + new_tokens)
    num_steps = new_tokens - 1
    sampled = sorted({i * num_steps // SAMPLED_STEPS for i in range(SAMPLED_STEPS)})
    prefill = _one_pass(engine, num_rows, 0, prompt_length)[0]
    steps = [_one_pass(engine, num_rows, prompt_length + i, 1) for i in sampled]
    decode, heads = (
        [sum(parts) / len(steps) for parts in zip(*kind, strict=True)] for kind in zip(*steps, strict=True)
    )
    return BareTimes(prefill, decode, heads, num_steps)


def _one_pass(engine: Engine, num_rows: int, start: int, length: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of each segment on `length` tokens a row behind `start` others, and of each head on the last
    ones.
    """
    runner, model, config = engine.stage, engine.model, engine.model.config
    hidden = torch.ones(num_rows * length, config.hidden_size, dtype=model.plan.dtype)
    each = engine.cache.pool.num_blocks // num_rows
    places = [engine.cache.slot_mapping(list(range(row * each, (row + 1) * each))) for row in range(num_rows)]
    tokens = AttentionMetadata(
        places,
        [start] * num_rows,
        [length] * num_rows,
        runner.tables,
        num_places=engine.cache.num_places,
        queries_per_group=config.num_attention_heads // config.num_query_groups,
    )
    segments, heads = [], []
    for index, segment in enumerate(runner.segments):
        began = time.perf_counter()
        hidden, inner = runner.layers_of(index, index)(hidden, tokens)
        segments.append(time.perf_counter() - began)
        began = time.perf_counter()
        taken = ExitInput(hidden)
        head = runner.heads[index]
        if isinstance(head, DecodeExitHead):
            taken = head.take(hidden, inner)
            if head.layer is not None:
                own = LayerStack([head.layer], [engine.cache.exit_head(segment.last_layer)])
                taken = ExitInput(hidden, layer_output=own(hidden, tokens)[0])
        asked = taken.rows(list(range(len(hidden) - num_rows, len(hidden))))
        head.ask(asked)[1].tolist()
        heads.append(time.perf_counter() - began)
    return segments, heads
