"""Stage 2: decoding a 7B in bfloat16, drawn at random on the device, against what the memory's bandwidth allows."""

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.sampling.policy import FULL, Policy
from gpu_stages.bench import ROOT, Bench
from gpu_stages.checks import Check, Finding, at_least
from gpu_stages.profile import steps_profiled

GOALS = {"full": 0.80, "fixed": 0.75}
"""Share of bytes ÷ bandwidth to reach at batch 1; the next goal is 0.85."""
TINY = [
    "--layers",
    "2",
    "--hidden",
    "64",
    "--inner",
    "96",
    "--heads",
    "4",
    "--vocab",
    "300",
    "--exits",
    "1",
    "--prompt-tokens",
    "8",
    "--new-tokens",
    "6",
    "--rounds",
    "1",
    "--dtype",
    "float32",
]


def ceilings(bench: Bench) -> Iterator[Finding]:
    """Measures the rates of this card's memory and matrix units, without code of this project."""
    yield Finding(what="a copy reads and writes", value=bench.bandwidth / 1e9, unit="GB/s")
    yield Finding(what="a bfloat16 product of 8192³", value=bench.matrix_rate / 1e12, unit="Tflop/s")


def batch_of_one(bench: Bench, kind: str) -> Iterator[Finding]:
    """Measures full depth and each fixed exit, as shares of bytes ÷ bandwidth."""
    model, options = _model(bench)
    ways = {"full": FULL, **{f"fixed {layer}": Policy(fixed_exit=layer) for layer in options.exits}}
    for way, policy in ways.items():
        row = _measured(bench, model, 1, way, policy, kind, options)
        what = f"batch 1, {way}, graphs {kind}"
        yield Finding(what=what, value=row.ms_per_step, unit="ms/token")
        if kind == "no":
            yield Finding(what=f"{what}, of the limit", value=row.share_of_limit)
        else:
            yield at_least(f"{what}, of the limit", row.share_of_limit, GOALS[way.split()[0]])


def batches(bench: Bench) -> Iterator[Finding]:
    """Measures full depth, threshold and speculation at batch 1, 8, 32 and 128."""
    from decoding_gpu import policies_of

    model, options = _model(bench)
    policies = {
        name.split()[0]: policy for name, policy in policies_of(model, options).items() if not name.startswith("fixed")
    }
    for batch in (1, 2) if bench.is_tiny else (1, 8, 32, 128):
        for way, policy in policies.items():
            row = _measured(bench, model, batch, way, policy, "yes", options)
            depth = "" if way == "full" else f", mean depth {row.mean_depth:.1f}"
            yield Finding(what=f"batch {batch}, {way}{depth}", value=row.tokens_per_second, unit="tokens/s")


def long_context(bench: Bench) -> Iterator[Finding]:
    """Measures full depth at batch 1 behind a prompt of 3000 tokens. Keys and values count among the bytes."""
    model, options = _model(bench)
    if not bench.is_tiny:
        options.prompt_tokens, options.rounds = 3000, 1
    row = _measured(bench, model, 1, "full", FULL, "yes", options)
    kept = 2 * options.prompt_tokens * options.layers * options.hidden * model.plan.dtype.itemsize
    yield Finding(what=f"batch 1 behind {options.prompt_tokens} tokens", value=row.ms_per_step, unit="ms/token")
    yield at_least(
        "the same, of the limit", row.share_of_limit + kept * row.tokens_per_second / bench.bandwidth, GOALS["full"]
    )


def against_transformers(bench: Bench) -> Iterator[Finding]:
    """Compares with `generate` of transformers with a static cache, compiled, at batch 1, for the same shape and dtype.
    Times are per token, without the prompt's.
    """
    model, options = _model(bench)
    ours = _measured(bench, model, 1, "full", FULL, "yes", options)
    del model
    bench.tidy()
    theirs = _theirs(bench, options)
    ids = torch.randint(options.vocab, (1, options.prompt_tokens), device=bench.device)

    def seconds(new_tokens: int) -> float:
        bench.wait()
        began = time.perf_counter()
        with torch.inference_mode():
            theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                cache_implementation="static",
                pad_token_id=0,
            )
        bench.wait()
        return time.perf_counter() - began

    long, short = options.new_tokens, options.new_tokens // 4
    for count in (long, short, long):  # compiles what is not compiled yet
        seconds(count)
    step = (min(seconds(long) for _ in range(2)) - min(seconds(short) for _ in range(2))) / (long - short)
    yield Finding(what="transformers, static cache, compiled", value=1000 * step, unit="ms/token")
    yield at_least("full depth ÷ transformers", 1000 * step / ours.ms_per_step, 1.0, "×")


def profile(bench: Bench) -> Iterator[Finding]:
    """Profiles a step at full depth: kernels, and the gaps between them. profile_decoding.json holds the whole
    profile.
    """
    from decoding_gpu import decode, graphs_as, made_engine

    model, options = _model(bench)
    with graphs_as("yes"):
        engine = made_engine(model, 1, options)
        decode(model, 1, FULL, options, engine)
        found = steps_profiled(lambda: decode(model, 1, FULL, options, engine), bench, num_steps=options.new_tokens)
    (bench.results / "profile_decoding.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    yield Finding(what="profile: the device is idle", value=found["idle_share"])
    yield Finding(what="profile: kernels a token", value=found["kernels_per_step"])
    for kernel in found["kernels"][:6]:
        yield Finding(what=f"profile: {kernel['name'][:70]}", value=kernel["share"], unit="of the time")
    for gap in found["gaps"][:3]:
        yield Finding(what=f"profile: gap before {gap['before'][:60]}", value=gap["microseconds"], unit="µs")


def _measured(
    bench: Bench, model: EarlyExitModel, batch: int, way: str, policy: Policy, kind: str, options: argparse.Namespace
) -> Any:
    from decoding_gpu import measure

    return measure(model, batch, way, policy, kind, bench.bandwidth, options)


def _model(bench: Bench) -> tuple[EarlyExitModel, argparse.Namespace]:
    from decoding_gpu import parsed, random_llama

    options = parsed(TINY if bench.is_tiny else sizes_of("llama-2-7b"))
    return random_llama(options, bench.topology), options


def sizes_of(example: str) -> list[str]:
    """Returns the shape in an example's config.json, under the names of the benchmark's flags."""
    config = json.loads((ROOT / "examples" / example / "config.json").read_text(encoding="utf-8"))
    named = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "inner": "intermediate_size",
        "heads": "num_attention_heads",
        "groups": "num_key_value_heads",
        "vocab": "vocab_size",
    }
    return [word for flag, key in named.items() for word in (f"--{flag}", str(config[key]))]


def _theirs(bench: Bench, options: argparse.Namespace) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        vocab_size=options.vocab,
        num_attention_heads=options.heads,
        num_key_value_heads=options.groups or options.heads,
        max_position_embeddings=4096,
    )
    with torch.device(bench.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    model.generation_config.eos_token_id = None
    return model


CHECKS = (
    Check("ceilings", 10, ceilings),
    Check("batch 1, by CUDA graphs", 30, partial(batch_of_one, kind="yes")),
    Check("profile of a step", 25, profile),
    Check("batches", 70, batches),
    Check("long context", 20, long_context),
    Check("against transformers, compiled", 110, against_transformers),
    Check("batch 1, fused graphs", 80, partial(batch_of_one, kind="fused")),
    Check("batch 1, kernel by kernel", 30, partial(batch_of_one, kind="no")),
)
