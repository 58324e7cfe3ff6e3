"""The decoder over stages, for long: ways to lay them out, thresholds, memory and requests at random."""

import random
from collections import Counter
from pathlib import Path

from decoding_stress import Report
from exits import write_exits
from random_models import random_llama
from stages import Way, run_at
from world import World

from ee_tuning.sampling.policy import FULL, Policy

WAYS = [
    Way(pp=2),
    Way(pp=2, layout=(4, 2)),
    Way(pp=2, layout=(0, 6)),
    Way(pp=2, plain=(0,)),
    Way(pp=4),
    Way(pp=4, layout=(1, 1, 2, 2)),
    Way(pp=4, layout=(2, 2, 1, 1)),
    Way(pp=4, plain=(1, 2)),
    Way(tp=2, pp=2),
]


def stress_stages(count: int, seed: int, folder: Path, world: World | None = None) -> Report:
    """`count` dozens of requests, each over stages and in one process. Without a world it has one of its own."""
    subjects = []
    for heads in ("mlp", "norm"):
        random_llama(folder / heads / "model", confident=True)
        subjects.append(
            (
                str(folder / heads / "model"),
                str(write_exits(folder / heads / "model", folder / heads / "exits", architecture=heads, init="copy")),
            )
        )
    rng, report, seen, ranks = random.Random(seed), Report(), Counter[str](), world or World()
    for index in range(count):
        subject, way = subjects[index % 2], rng.choice(WAYS)
        given = _policy(rng), rng.choice([None, 64, 80, 96]), rng.randrange(1 << 30)
        told = f"{index}: {way}, {given}"
        try:
            wanted = run_at(*subject, Way(), *given)
            for run in ranks.run(run_at, *subject, way, *given, timeout=60):
                if run.said != wanted.said:
                    report.failures.append(f"{told}: {run.said}, in one process {wanted.said}")
            seen += {"overlaps": run.num_overlaps, "put back": run.num_put_back, "broken off": run.num_broken_off}
        except Exception as error:  # whatever it is, the others are tried too
            report.failures.append(f"{told}: {type(error).__name__}: {error}")
    if world is None:
        ranks.stop()
    report.told = (
        f"A dozen requests each, over two and four stages in {len(WAYS)} layouts, with the kernels and without, in much memory "
        "and little: tokens, exits and ends are those of one process piece by piece. "
        f"In {seen['overlaps']} steps some said a token while others were on their way; {seen['broken off']} were broken off "
        f"there, and {seen['put back']} lost their memory and came back."
    )
    return report


def _policy(rng: random.Random) -> Policy:
    kind = rng.randrange(6)
    if kind == 0:
        return FULL
    if kind == 1:
        return Policy(fixed_exit=rng.choice([2, 4]))
    asked = [[2], [4], [2, 4], [2, 4]][kind - 2]
    return Policy(thresholds={layer: rng.choice([0.2, 0.3, 0.4, 0.6]) for layer in asked})
