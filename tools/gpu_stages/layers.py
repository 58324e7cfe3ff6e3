"""Stage 5: as many layers of larger models as fit, compared with the times that `plan` assumes, and this card compared
with the table of GPUs.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.planning.attention_flops import dense_attention_flops
from ee_tuning.planning.gpus import GPUS, Gpu
from ee_tuning.sampling.policy import FULL
from gpu_stages.bench import Bench
from gpu_stages.checks import Check, Finding, at_least
from gpu_stages.decoding import TINY, sizes_of

SEQUENCE, MICRO_BATCHES = 2048, (1, 4)
EFFICIENCY = 0.5
"""Default share of a GPU's peak rate in `plan`."""
MOST_LAYERS = 16


def the_table(bench: Bench) -> Iterator[Finding]:
    """Compares this card's measured limits with its row of the table."""
    card = _row_of(torch.cuda.get_device_name() if bench.is_cuda else "NVIDIA H100")
    if card is None:
        yield Finding(what="the table of GPUs", value="has no row for this card")
        return
    yield Finding(what=f"copy ÷ bandwidth of {card.name} in the table", value=bench.bandwidth / 1e9 / card.bandwidth)
    yield Finding(what=f"8192³ ÷ peak of {card.name} in the table", value=bench.matrix_rate / 1e12 / card.tflops)
    if bench.is_cuda:
        free, total = torch.cuda.mem_get_info()
        yield Finding(
            what=f"memory of {card.name} in the table: {card.memory:g} GB; here", value=total / 1e9, unit="GB"
        )
        yield Finding(
            what="taken by the context and the allocator",
            value=(total - free - torch.cuda.memory_reserved()) / 1e9,
            unit="GB",
        )


def times(bench: Bench, example: str) -> Iterator[Finding]:
    """Times a layer over whole sequences, as in tuning, and over one token, as in decoding."""
    from decoding_gpu import measure, parsed, random_llama

    options = parsed(
        TINY if bench.is_tiny else [*sizes_of(example), "--exits", "1", "--new-tokens", "32", "--rounds", "1"]
    )
    options.layers = min(options.layers, MOST_LAYERS)
    model = random_llama(options, bench.topology)
    name, length = example, 16 if bench.is_tiny else SEQUENCE
    for rows in MICRO_BATCHES:
        hidden = torch.randn(length, rows, options.hidden, device=bench.device, dtype=model.plan.dtype)
        seconds = bench.seconds(partial(model.run_layers, hidden), repeats=5) / options.layers
        flops = _flops_of_layer(model, length, rows)
        yield Finding(what=f"{name}, a layer, micro-batch {rows}", value=1000 * seconds, unit="ms")
        yield at_least(
            f"{name}, a layer, micro-batch {rows}, of the matrix rate", flops / seconds / bench.matrix_rate, EFFICIENCY
        )
    row = measure(model, 1, "full", FULL, "yes", bench.bandwidth, options)
    yield Finding(what=f"{name}, {options.layers} layers, a token", value=row.ms_per_step, unit="ms")
    yield at_least(f"{name}, a token, of the limit", row.share_of_limit or 0.0, 0.80)


def _flops_of_layer(model: EarlyExitModel, length: int, rows: int) -> int:
    """Returns the operations of a micro-batch in a layer."""
    layer, config = model.backbone.layer(1), model.config
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    heads: Any = torch.empty(rows, config.num_attention_heads, length, config.kv_channels, device="meta")
    attention = dense_attention_flops({"query": heads, "key": heads, "is_causal": True})
    return 2 * matrices * length * rows + attention


def _row_of(card: str) -> Gpu | None:
    """Returns the row of the table for a card's name, as the driver reports it."""
    joined = card.lower().replace(" ", "")
    return next((gpu for name, gpu in GPUS.items() if name in joined), None)


CHECKS = (
    Check("the table of GPUs", 10, the_table),
    Check("layers of a 70B", 25, partial(times, example="llama-2-70b")),
    Check("layers of an 8B with grouped queries", 20, partial(times, example="llama-3.1-8b")),
    Check("layers of a 13B", 20, partial(times, example="llama-2-13b")),
)
