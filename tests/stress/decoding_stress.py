"""The decoder, for long: mixtures of requests by the thousand, drafts on prompts nobody learned from, and tokens by the
ten thousand.
"""

import gc
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decoding import FixedDrafts, policy_for
from exits import write_exits
from mixtures import Subject, mixture
from random_models import random_llama

from ee_tuning import EarlyExitLLM
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.data.sample_corpus import sample_corpus
from ee_tuning.demo.demo import CHECKOUT
from ee_tuning.engine.engine import Engine
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams

MODEL = CHECKOUT / "examples" / "tiny-python-llama"
PROMPT_BYTES, NEW_TOKENS = 160, 48
SLACK_BYTES = 8 << 20
"""What a process may grow by for no reason of ours: allocators round up."""


@dataclass
class Report:
    """What came of it."""

    failures: list[str] = field(default_factory=list)
    told: str = ""

    def table(self) -> str:
        """Markdown."""
        return self.told


def stress_mixtures(count: int, seed: int, folder: Path) -> Report:
    """`count` mixtures with their own seeds."""
    subjects = [Subject(folder / heads, heads) for heads in ("mlp", "layer,mlp", "norm,layer")]
    report, seen = Report(), Counter[str]()
    for index in range(count):
        try:
            seen += mixture(subjects[index % len(subjects)], seed * 1_000_000 + index)
        except Exception as error:  # whatever it is, the others are tried too
            report.failures.append(f"mixture {index}: {type(error).__name__}: {error}")
    report.told = (
        f"{seen['requests']} requests, by heads, policies, lengths, penalties, memory and common beginnings drawn at random, "
        f"equal to a plain decoder's in {seen['steps']} steps; {seen['aborted']} were aborted, {seen['put back']} lost their "
        f"memory and came back, and {seen['reused']} tokens of prompts were not computed, for another had computed them."
    )
    return report


def stress_speculation(count: int, seed: int, folder: Path) -> Report:
    """`count` prompts from files that the shipped model did not learn from, in float64: drafts change no token,
    greedily nor drawn.
    """
    exits = write_exits(MODEL, folder / "heads", exit_layers=[3, 6, 9], init="copy")
    llm, report, prompts = EarlyExitLLM.load(MODEL, exits, dtype="float64"), Report(), held_out_prompts(count)
    drafted = accepted = tokens = 0
    for sampling in ({}, {"temperature": 0.8, "top_p": 0.95, "seed": seed}):
        options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, **sampling}
        half = prompts[::2] if sampling else prompts[1::2]
        full = llm.generate(half, policy="full", **options)
        assert llm.engine is not None
        llm.engine.proposer.speculation = FixedDrafts(llm.engine, {3: 0.5})  # whatever heads that were not tuned bring
        mine = llm.generate(half, policy="speculative", **options)
        for one, other in zip(full, mine, strict=True):
            tokens += len(one.token_ids)
            drafted, accepted = drafted + other.statistics.num_drafted, accepted + other.statistics.num_accepted
            if one.token_ids != other.token_ids:
                report.failures.append(f"{one.prompt!r}, {sampling}: {one.text!r}, and speculatively {other.text!r}")
    if not 0 < accepted < drafted:
        report.failures.append(f"{accepted} of {drafted} drafts accepted: nothing was put to the test")
    report.told = (
        f"{count} prompts of {PROMPT_BYTES} held-out bytes, {tokens} tokens, half of them drawn at temperature 0.8: those of "
        f"full depth; {drafted} were drafted and {accepted} of them right, by heads that were not tuned."
    )
    return report


def held_out_prompts(count: int) -> list[str]:
    """As many, spread over the held-out files."""
    text = "".join(data.decode(errors="replace") for _, data in sorted(sample_corpus()[1].items()))
    step = (len(text) - PROMPT_BYTES) // count
    return [text[i * step : i * step + PROMPT_BYTES] for i in range(count)]


def stress_growth(count: int, seed: int, folder: Path) -> Report:
    """`count` tokens of one completion, and as many in short ones: the process grows by the formula of the KV cache and
    nothing else.
    """
    random_llama(folder / "model", confident=True, max_position_embeddings=count + 64)
    exits = write_exits(folder / "model", folder / "exits")
    config = load_config(None, {"model.path": str(folder / "model"), "exits.path": str(exits)})
    loaded, report = load_for_generation(config, init_parallel(ParallelSection())), Report()
    policy, told = policy_for(loaded.model, threshold=0.6), []
    for name, length, num_requests in (("one", count, 1), ("short ones of 50", 50, count // 50)):
        engine = Engine(loaded.model, loaded.stages, num_slots=2, max_length=length + 40)
        formula = engine.cache.bytes_per_token * loaded.model.config.num_layers * engine.cache.num_places
        for warm in (True, False):
            before, made = resident_bytes(), 0
            for index in range(1 + num_requests // 10 if warm else num_requests):
                engine.add_request(
                    [5, (seed + index) % 90, 7],
                    SamplingParams(
                        max_tokens=min(length, 100) if warm else length, ignore_eos=True, repetition_penalty=1.1
                    ),
                    policy,
                )
                while not engine.is_idle:
                    made += len(engine.step())
            grown = resident_bytes() - before
        kept = {
            "boundary, counts": len(engine.stage.sampler._counts) + len(engine.running) + len(engine.waiting),
            "cache beyond the formula": sum(
                each.keys.nbytes + each.values.nbytes for each in engine.cache._layers.values()
            )
            - formula,
            "blocks": len(engine.cache.pool._contents) - engine.cache.pool.num_blocks,
        }
        if grown > formula + SLACK_BYTES or any(size > 0 for size in kept.values()):
            report.failures.append(
                f"{name}: {grown / 2**20:.1f} MB for {made} tokens, the cache takes {formula / 2**20:.1f}; {kept}"
            )
        told.append(f"{made} tokens in {name}: {grown / 2**20:+.1f} MB (the cache: {formula / 2**20:.1f})")
    report.told = "Memory of the process, a random model of 6 layers × 48: " + "; ".join(told) + "."
    return report


def resident_bytes() -> int:
    """Of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
