"""Decoding on a GPU, compared with reading each weight once per step, for every policy and batch, with CUDA graphs and
without.

    python benchmarks/decoding_gpu.py --json decoding_gpu.json --profile profile.txt
    python benchmarks/decoding_gpu.py --batches 1 --layers 4 --hidden 64 --inner 128 --heads 4 --vocab 300 --exits 1 2
    --new-tokens 24

A Llama of 7B parameters (32 layers × 4096, bfloat16) with `norm` exits that have an output matrix of their own, drawn
at random on the
device: no file is read, torch and megatron-core are all that is needed. A few minutes on one H100. Layers behind the
first exit add little to the states, so that exits are often right, as those of a tuned model are, and speculation has
something to gain.

The limit is the bytes of the weights that a token's layers and head have, over the bandwidth that a copy of 1 GB
reaches here. Each way decodes once unmeasured, which records the graphs, and then `--rounds` times; the median counts.
Steps that read prompts are left out of the time. `threshold` is that which a share of tokens (`--leaving`) passes at
the first exit. `fused` graphs, for which torch needs triton, are measured for policies of one depth at the first batch
alone: each number of tokens is compiled by itself.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ee_tuning.config import ParallelSection
from ee_tuning.decoding import graphs
from ee_tuning.engine.engine import Engine, TokenStep
from ee_tuning.model.early_exit import EarlyExitModel, StagePlan
from ee_tuning.model.exit_spec import ExitSpec
from ee_tuning.model_config.config import ModelConfig, RopeConfig
from ee_tuning.parallel.topology import Topology, init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

COPIED_BYTES = 2**30
SWITCHED = {"yes": "1", "no": "0", "fused": "fused"}
"""Value of --graphs -> value of the environment variable."""
GOALS = {"full": 0.80, "fixed": 0.75}
"""Share of the limit to reach at batch 1."""
QUIET = 0.02
"""Size of the contribution of layers behind the first exit to the states, relative to that of the others."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of decoding."""

    batch: int
    way: str
    graphs: str
    """yes, no or fused."""
    tokens_per_second: float
    mean_depth: float
    ms_per_step: float
    share_of_limit: float | None
    """Share of the limit at batch 1, for policies of constant depth."""


def main() -> None:
    """Measures, and prints the tables."""
    options = parsed()
    topology = init_parallel(ParallelSection())
    bandwidth, model = _bandwidth(topology.device), random_llama(options, topology)
    name = torch.cuda.get_device_name() if topology.device.type == "cuda" else "CPU, where nothing is recorded"
    print(
        f"{name}; torch {torch.__version__}; {sum(p.numel() for p in model.parameters()) / 1e9:.2f}G parameters in {options.dtype}; "
        f"a copy reads and writes {bandwidth / 1e9:.0f} GB/s; {options.prompt_tokens} tokens of prompt, {options.new_tokens} new ones\n"
    )
    policies = policies_of(model, options)
    if options.profile:
        _profile(model, options)
    print("| batch | way | graphs | mean depth | ms/step | tokens/s | of the limit |\n|---|---|---|---|---|---|---|")
    rows = []
    for batch in options.batches:
        for way, policy in policies.items():
            for kind in options.graphs:
                if kind != "fused" or (batch == options.batches[0] and _has_one_depth(policy)):
                    rows += _measured(model, batch, way, policy, kind, bandwidth, options)
    _print_goals(rows)
    if options.json:
        told = {"device": name, "bandwidth": bandwidth, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(told, indent=2) + "\n")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; the default sizes are those of a 7B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (
        ("layers", 32),
        ("hidden", 4096),
        ("inner", 11008),
        ("heads", 32),
        ("groups", None),
        ("vocab", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--exits", type=int, nargs="+", default=[8, 16, 24])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--leaving", type=float, default=0.6, help="share of tokens that pass the first exit")
    parser.add_argument("--graphs", nargs="+", choices=list(SWITCHED), default=list(SWITCHED))
    parser.add_argument("--profile", type=Path, help="write torch.profiler's table of full depth at batch 1 there")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args(arguments)


def random_llama(options: argparse.Namespace, topology: Topology) -> EarlyExitModel:
    """Builds the model that `options` describe, drawn on the device."""
    config = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=options.inner,
        num_attention_heads=options.heads,
        num_query_groups=options.groups or options.heads,
        kv_channels=options.hidden // options.heads,
        vocab_size=options.vocab,
        max_position_embeddings=4096,
        norm_epsilon=1e-5,
        rope=RopeConfig(),
        ties_embeddings=False,
    )
    exits = tuple(ExitSpec(layer=layer, architecture="norm", ties_output=False) for layer in options.exits)
    model = EarlyExitModel(
        config,
        topology,
        StagePlan(
            first_layer=1,
            last_layer=options.layers,
            exits=exits,
            has_final_head=True,
            max_length=4096,
            dtype=getattr(torch, options.dtype),
        ),
    )
    draw = torch.Generator(topology.device).manual_seed(0)
    output = model.backbone.output_layer.weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 1 / parameter.shape[1] ** 0.5, generator=draw)
        model.backbone.embedding.word_embeddings.weight.normal_(0, 1, generator=draw)
        output.mul_(5)  # makes the likeliest tokens stand out
        for number in range(options.exits[0] + 1, options.layers + 1):
            layer = model.backbone.layer(number)
            layer.self_attention.linear_proj.weight.mul_(QUIET)
            layer.mlp.linear_fc2.weight.mul_(QUIET)
        for spec in exits:
            model.exit_head(spec.layer).output_weight.copy_(output)
    return model.requires_grad_(False)


def _bandwidth(device: torch.device) -> float:
    """Returns bytes per second, read and written."""
    source = torch.empty(
        COPIED_BYTES if device.type == "cuda" else COPIED_BYTES // 16, dtype=torch.uint8, device=device
    )
    target, times = torch.empty_like(source), []
    for _ in range(8):
        _wait(device)
        began = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        _wait(device)
        times.append((time.perf_counter() - began) / 10)
    return 2 * len(source) / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def policies_of(model: EarlyExitModel, options: argparse.Namespace) -> dict[str, Policy]:
    """Returns the policies by name; the threshold is measured."""
    first = options.exits[0]
    with graphs_as("yes"):
        confidences = [step.confidence for step in decode(model, 1, Policy(fixed_exit=first), options)[0]]
    threshold = sorted(confidences)[int((1 - options.leaving) * len(confidences))]
    fixed = {f"fixed {layer}": Policy(fixed_exit=layer) for layer in options.exits}
    return {
        "full": FULL,
        **fixed,
        f"threshold {threshold:.3g}": Policy(thresholds=dict.fromkeys(options.exits, threshold)),
        "speculative": Policy(drafts_at=tuple(options.exits)),
    }


@contextmanager
def graphs_as(kind: str) -> Iterator[None]:
    """Sets the graphs of engines that are created within the block: yes, no or fused."""
    before = os.environ.get(graphs.SWITCH)
    os.environ[graphs.SWITCH] = SWITCHED[kind]
    try:
        yield
    finally:
        if before is None:
            del os.environ[graphs.SWITCH]
        else:
            os.environ[graphs.SWITCH] = before


def made_engine(model: EarlyExitModel, batch: int, options: argparse.Namespace) -> Engine:
    """Returns an engine for `batch` sequences, which share nothing."""
    return Engine(
        model,
        [(1, options.layers)],
        num_slots=batch,
        max_length=options.prompt_tokens + options.new_tokens + 16,
        prefill_chunk=2048,
        reuses_prefixes=False,
    )


def decode(
    model: EarlyExitModel, batch: int, policy: Policy, options: argparse.Namespace, engine: Engine | None = None
) -> tuple[list[TokenStep], float, int]:
    """Returns the tokens after the prompts, and the seconds and steps that they took."""
    engine = engine or made_engine(model, batch, options)
    draw = torch.Generator().manual_seed(batch)
    params = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True)
    for _ in range(batch):
        engine.add_request(
            torch.randint(options.vocab, (options.prompt_tokens,), generator=draw).tolist(), params, policy
        )
    while engine.waiting or any(not s.num_output for s in engine.running):
        engine.step()
    steps: list[TokenStep] = []
    count, began = 0, time.perf_counter()
    while not engine.is_idle:
        steps += engine.step()
        count += 1
    return steps, time.perf_counter() - began, count


def _measured(
    model: EarlyExitModel,
    batch: int,
    way: str,
    policy: Policy,
    kind: str,
    bandwidth: float,
    options: argparse.Namespace,
) -> list[Row]:
    """Prints the row and returns it in a list, which is empty where this machine can not measure it: the others count
    all the same.
    """
    try:
        row = measure(model, batch, way, policy, kind, bandwidth, options)
    except (RuntimeError, ImportError) as error:  # triton, its compiler or memory is missing
        print(
            f"| {batch} | {way} | {kind} | {type(error).__name__}: {str(error).strip().splitlines()[0][:200]} |",
            flush=True,
        )
        return []
    print(_line(row), flush=True)
    return [row]


def measure(
    model: EarlyExitModel,
    batch: int,
    way: str,
    policy: Policy,
    kind: str,
    bandwidth: float,
    options: argparse.Namespace,
) -> Row:
    """Measures one way of decoding, `options.rounds` times after a first time that records the graphs."""
    gc.collect()  # frees the former engine, whose cache is as large
    with graphs_as(kind):
        engine = made_engine(model, batch, options)
        runs = [decode(model, batch, policy, options, engine) for _ in range(options.rounds + 1)][1:]
    rate = statistics.median(len(steps) / seconds for steps, seconds, _ in runs)
    layers = [step.exit_layer for step in runs[-1][0]]
    share = None
    if batch == 1 and _has_one_depth(policy):
        share = rate * bytes_of(model, policy.fixed_exit) / bandwidth
    return Row(
        batch=batch,
        way=way,
        graphs=kind,
        tokens_per_second=rate,
        mean_depth=sum(layers) / len(layers),
        ms_per_step=1000 * statistics.median(seconds / count for _, seconds, count in runs),
        share_of_limit=share,
    )


def _has_one_depth(policy: Policy) -> bool:
    return not policy.thresholds and not policy.drafts_at


def bytes_of(model: EarlyExitModel, fixed_exit: int | None) -> int:
    """Returns the bytes of the weights that a token reads."""
    read: list[Any] = (
        [*model.backbone.output_layer.parameters()]
        if fixed_exit is None
        else [*model.exit_head(fixed_exit).parameters()]
    )
    for number in range(1, (fixed_exit or model.config.num_layers) + 1):
        read += model.backbone.layer(number).parameters()
    return sum(weight.nbytes for weight in read)


def _line(row: Row) -> str:
    share = "" if row.share_of_limit is None else f"{row.share_of_limit:.2f}"
    return (
        f"| {row.batch} | {row.way} | {row.graphs} | {row.mean_depth:.1f} | {row.ms_per_step:.2f} | "
        f"{row.tokens_per_second:.0f} | {share} |"
    )


def _print_goals(rows: list[Row]) -> None:
    print("\n| batch 1 | graphs | of the limit | goal | met |\n|---|---|---|---|---|")
    for row in rows:
        if row.share_of_limit is not None and row.graphs != "no":
            goal = GOALS[row.way.split()[0]]
            print(
                f"| {row.way} | {row.graphs} | {row.share_of_limit:.2f} | ≥ {goal} | {'yes' if row.share_of_limit >= goal else 'no'} |"
            )
    without = {(row.batch, row.way): row.tokens_per_second for row in rows if row.graphs == "no"}
    print("\n| batch | way | graphs | ÷ without |\n|---|---|---|---|")
    for row in rows:
        if row.graphs != "no" and (row.batch, row.way) in without:
            print(
                f"| {row.batch} | {row.way} | {row.graphs} | {row.tokens_per_second / without[row.batch, row.way]:.2f} |"
            )


def _profile(model: EarlyExitModel, options: argparse.Namespace) -> None:
    with graphs_as("yes"):
        engine = made_engine(model, 1, options)
        decode(model, 1, FULL, options, engine)
        with torch.profiler.profile() as profile:
            decode(model, 1, FULL, options, engine)
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    options.profile.write_text(profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90) + "\n")


if __name__ == "__main__":
    main()
