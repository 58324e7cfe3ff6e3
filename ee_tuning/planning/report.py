"""`ee-tuning plan`: prints a plan as text or as one JSON object."""

import dataclasses
from typing import Any

from ee_tuning.config import Config
from ee_tuning.json_file import to_json
from ee_tuning.planning.dry_run import MEMORY
from ee_tuning.planning.gpus import RESERVED_GB
from ee_tuning.planning.plan import FORMULA, StageFigures, TuningPlan
from ee_tuning.text_table import table_lines


def print_plan(config: Config, plan: TuningPlan, *, is_smallest: bool, as_json: bool) -> bool:
    """Prints the plan of `config` and returns whether every rank fits. `is_smallest`: the number of GPUs was searched
    for.
    """
    if as_json:
        print(to_json(plan_tree(plan), indent=2))
        return plan.fits
    lines = _lines(config, plan)
    if is_smallest:
        found = (
            "the fewest that fit"
            if plan.fits
            else "more of them would not help: raise tensor × pipeline, or take larger GPUs"
        )
        lines[1:1] = [
            f"number of GPUs: {plan.cluster.world_size}, {found} (neither --nodes nor --gpus-per-node is given)"
        ]
    print("\n".join(lines))
    return plan.fits


def plan_tree(plan: TuningPlan) -> dict[str, Any]:
    """Returns the plan as plain data in bytes and seconds, with explanations."""
    return {
        **dataclasses.asdict(plan),
        "world_size": plan.cluster.world_size,
        "reserved_bytes": int(RESERVED_GB * 1e9),
        "memory_is": MEMORY,
        "formula": list(FORMULA),
    }


def _lines(config: Config, plan: TuningPlan) -> list[str]:
    cluster, gpu, tuning = plan.cluster, plan.cluster.gpu, config.tuning
    yes = "fits" if plan.fits else "DOES NOT FIT"
    weights = "" if tuning.backbone_weights == "native" else f", frozen layers in {tuning.backbone_weights}"
    chunks = f" in chunks of {plan.chunk_length}" if plan.chunk_length != plan.seq_length else ""
    return [
        f"{config.model.path} on {cluster.nodes} × {cluster.gpus_per_node} {gpu.name}: tensor {plan.tensor} × "
        f"pipeline {plan.pipeline} × "
        f"data {plan.data}, sequences of {plan.seq_length}{chunks}, micro-batch {tuning.micro_batch_size}, global batch "
        f"{tuning.global_batch_size}{weights}",
        "",
        *_table(plan.stages),
        "",
        "GB (10⁹ bytes) on each GPU at the worst moment:",
        *(f"  {kind}: {meaning}" for kind, meaning in MEMORY.items()),
        f"{yes}: {max(each.total_bytes for each in plan.stages) / 1e9:.1f} GB at the most, of {gpu.memory:g} GB less "
        f"{RESERVED_GB:g} that "
        "are kept for the context, NCCL and the allocator",
        *[
            f"fitting exits before the first step: {plan.fit_bytes / 1e9:.1f} GB at the most, {_seconds(plan.fit_seconds)}"
            for _ in range(plan.fit_bytes > 0)
        ],
        f"beside each GPU {max(each.memory['optimizer'] for each in plan.stages) / 1e9:.1f} GB of the host's memory, "
        "at the most, for the "
        "copy that checkpoints are written from",
        "",
        f"step {_seconds(plan.step_seconds)}, {plan.tokens_per_second:,.0f} tokens/s, {plan.efficiency_of_run:.0%} of the GPUs' peak",
        f"{plan.tokens:,} tokens in {tuning.train_iters:,} steps: {plan.hours:.1f} hours, {plan.gpu_hours:.0f} GPU-hours",
        "",
        f"with {gpu.tflops:g} Tflop/s at {cluster.efficiency:.0%} efficiency (assumed), memory {gpu.bandwidth:g} GB/s, between GPUs "
        f"{gpu.link:g}, between nodes {gpu.network:g} GB/s one way:",
        *(f"  {formula}" for formula in FORMULA),
    ]


def _table(stages: tuple[StageFigures, ...]) -> list[str]:
    head = ["stage", "layers", "exits", *MEMORY, "total", "ms/micro-batch", "idle"]
    rows = [
        [
            _spans([(stage, stage) for stage in each.stages]),
            _spans(list(each.layers)),
            ", ".join(str(layer) for own in each.exits for layer in own) or "none",
            *(f"{each.memory[kind] / 1e9:.2f}" for kind in MEMORY),
            f"{each.total_bytes / 1e9:.1f}{'' if each.fits else ' !'}",
            f"{each.micro_batch * 1e3:.0f}",
            f"{each.idle_share:.0%}",
        ]
        for each in stages
    ]
    return table_lines(head, rows, num_left=3)


def _spans(spans: list[tuple[int, int]]) -> str:
    """Formats spans of numbers, with adjacent ones joined: [(1, 10), (11, 20), (31, 40)] -> 1-20, 31-40."""
    joined: list[tuple[int, int]] = []
    for first, last in spans:
        if joined and joined[-1][1] + 1 == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return ", ".join(
        str(first) if first == last else f"{first}-{last}" if first < last else "none" for first, last in joined
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
