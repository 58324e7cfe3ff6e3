"""Stage 4: two pipeline stages on one GPU, over gloo by pinned memory, and over NCCL where that allows it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ee_tuning.config import ParallelSection, load_config
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import Topology, init_parallel
from ee_tuning.tuning.command import tune_within
from gpu_stages.bench import SHIPPED, Bench
from gpu_stages.checks import Check, Finding, at_least, at_most
from gpu_stages.ranks import run_ranks
from gpu_stages.right import EXIT_LAYERS, POLICIES, train_losses, tuning_job

PROMPTS = ("def main():\n", "class Reader:\n    def __init__(self")


def pass_states(shape: tuple[int, int, int], num_microbatches: int) -> dict[str, Any]:
    """Sends micro-batches of known content down the relay, with work for the device in between. Returns the values that
    the last stage received.
    """
    topology = init_parallel(ParallelSection(pipeline_model_parallel_size=2))
    relay, held = Relay(topology, shape, torch.bfloat16), []
    work = torch.full(
        (shape[2], shape[2]), 1 / shape[2], device=topology.device, dtype=torch.bfloat16
    )  # maps ones to ones
    began = time.perf_counter()
    next_action, index = NextAction.NEXT, 0
    while next_action is not NextAction.END:
        if topology.is_first_stage:
            next_action = NextAction.NEXT if index < num_microbatches - 1 else NextAction.END
            relay.send(
                _worked(torch.full(shape, float(index), device=topology.device, dtype=torch.bfloat16), work),
                next_action=next_action,
            )
        else:
            hidden, next_action = relay.receive()
            held.append(_worked(hidden, work))
            held[-1] = torch.stack((held[-1].amin(), held[-1].amax()))
        index += 1
    relay.finish()
    return {
        "held": [each.tolist() for each in held],
        "seconds": time.perf_counter() - began,
        "device": str(topology.device),
    }


def _worked(hidden: torch.Tensor, work: torch.Tensor) -> torch.Tensor:
    """Returns the same numbers after some work of the device."""
    for _ in range(4):
        hidden = (hidden @ work).round_()
    return hidden


def tuned_and_decoded(folder: str, num_stages: int, num_steps: int, seq_length: int, num_new: int) -> dict[str, Any]:
    """Returns the losses of a tuning run over the stages, and the tokens of every policy with the initial heads."""
    parallel = {"parallel.pipeline_model_parallel_size": num_stages}
    config = tuning_job(folder, num_steps, seq_length, **parallel)
    topology = init_parallel(config.parallel)
    tune_within(config, topology)
    topology.barrier()
    return {"losses": train_losses(Path(folder)), "said": _said(Path(folder), parallel, topology, num_new)}


def _said(folder: Path, parallel: dict[str, Any], topology: Topology, num_new: int) -> dict[str, list[list[int]]]:
    config = load_config(
        None,
        {"model.path": str(SHIPPED), "model.dtype": "float32", "exits.path": str(folder / "exit_heads"), **parallel},
    )
    llm = EarlyExitLLM.from_config(config, topology)
    policies = {
        name: {**policy, "exit_layer": EXIT_LAYERS[0]} if name == "fixed" else policy
        for name, policy in POLICIES.items()
    }
    return {
        name: [
            each.token_ids for each in llm.generate(list(PROMPTS), max_new_tokens=num_new, ignore_eos=True, **policy)
        ]
        for name, policy in policies.items()
    }


def relay_of_two(bench: Bench) -> Iterator[Finding]:
    """Checks the relay by itself: order, content, and no deadlock."""
    shape, count = ((8, 1, 32), 5) if bench.is_tiny else ((2048, 1, 4096), 60)
    _, last = _ranks(bench, pass_states, (shape, count))
    yield Finding(what="two processes on", value=last["device"])
    right = sum(each == [float(index)] * 2 for index, each in enumerate(last["held"]))
    yield at_least("micro-batches that arrived right and in order", right / count, 1.0, is_must=True)
    size = shape[0] * shape[1] * shape[2] * 2
    yield Finding(what="hidden states over gloo", value=size * count / last["seconds"] / 1e9, unit="GB/s")


def job_of_two(bench: Bench) -> Iterator[Finding]:
    """Compares tuning and decoding over two stages with one stage in one process that sees the same device."""
    sizes = (2, 32, 4) if bench.is_tiny else (10, 256, 32)
    two, _ = _ranks(bench, tuned_and_decoded, (str(bench.folder()), 2, *sizes))
    one = tuned_and_decoded(str(bench.folder()), 1, *sizes)
    apart = max(
        abs(mine[layer] / other[layer] - 1)
        for mine, other in zip(two["losses"], one["losses"], strict=True)
        for layer in other
    )
    yield at_most("losses of two stages, relative to those of one", apart, 1e-3, is_must=True)
    for name, said in one["said"].items():
        same = sum(a == b for a, b in zip(two["said"][name], said, strict=True)) / len(said)
        yield at_least(f"texts of two stages that are those of one, {name}", same, 1.0, is_must=True)


def over_nccl(bench: Bench) -> Iterator[Finding]:
    """Tries NCCL with two ranks on one card. NCCL mostly refuses that, which is no failure."""
    if not bench.is_cuda:
        yield Finding(what="NCCL with two ranks on one GPU", value="no GPU")
        return
    try:
        _, last = _ranks(bench, pass_states, ((2048, 1, 4096), 20), environment={"LOCAL_WORLD_SIZE": "1"}, seconds=60)
    except RuntimeError as error:
        reason = next(
            (line for line in str(error).split("\n") if "uplicate GPU" in line), str(error).strip().split("\n")[-1]
        )
        yield Finding(what="NCCL with two ranks on one GPU", value=f"refused: {reason[:120]}")
        return
    right = sum(each == [float(index)] * 2 for index, each in enumerate(last["held"]))
    yield at_least("NCCL with two ranks on one GPU: micro-batches that arrived right", right / 20, 1.0, is_must=True)


def _ranks(
    bench: Bench,
    function: Any,
    arguments: tuple[Any, ...],
    *,
    environment: dict[str, str] | None = None,
    seconds: float = 90,
) -> list[Any]:
    """Returns the results of the first and the second stage."""
    if bench.stages is not None:
        return bench.stages(function, *arguments)
    return run_ranks(function, arguments, bench.folder(), size=2, seconds=seconds, environment=environment or {})


CHECKS = (
    Check("relay", 25, relay_of_two),
    Check("tuning and decoding over two stages", 60, job_of_two),
    Check("NCCL", 30, over_nccl),
)
