"""Jobs decoded by all replicas of a model (data parallelism), each its share; rank 0 takes completions as they are
made.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ee_tuning.config import GenerationSection
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.job import CHARACTERS_OF_TOKEN, READ_FOR_ONE_MADE, Job
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.reports import Reports
from ee_tuning.storage.work_partition import share_of


class _Made(NamedTuple):
    """What a replica tells of its work."""

    num_tokens: int
    """Tokens since its last report."""
    job: int
    completion: Completion


def work_of(job: Job) -> int:
    """An estimate of what a job costs, from the lengths of its prompt and, at most, of its completions."""
    read = len(job.prompt_ids) or len(job.prompt) // CHARACTERS_OF_TOKEN
    return 1 + read + READ_FOR_ONE_MADE * job.params.n * job.params.max_tokens


def decode_shared(
    llm: EarlyExitLLM,
    jobs: Sequence[Job],
    options: GenerationSection,
    take: Callable[[int, Completion], None],
    count_tokens: Callable[[int], None] = lambda count: None,
    *,
    keeps_errors: bool = True,
) -> None:
    """Decodes the jobs, and calls `take` on rank 0 with each finished completion, or error, and its job's place, once,
    about as soon as it is there. All ranks call it with the same jobs; it ends when all are done.

    `keeps_errors` as in `EarlyExitLLM.run`. Where it fails on one rank all raise; see Reports.
    """
    topology = llm.model.topology
    share = share_of({place: work_of(job) for place, job in enumerate(jobs)}, topology.dp_rank, topology.dp)
    speaks = topology.stage == 0 and topology.tp_rank == 0  # of a replica's ranks, which know the same
    num_tokens, told = 0, set[tuple[int, int]]()
    completions: list[Completion] = []
    known: dict[tuple[int, int], Completion] = {}
    """Place in the share, and which of the job's -> completion."""

    def take_made(made: _Made) -> None:
        count_tokens(made.num_tokens)
        take(made.job, made.completion)

    with Reports(topology, take_made) as reports:

        def tell(key: tuple[int, int]) -> None:
            nonlocal num_tokens
            if speaks and key not in told:
                told.add(key)
                reports.put(_Made(num_tokens, share[key[0]], known[key]))
                num_tokens = 0

        def tell_errors() -> None:
            known.update({(each.prompt_index, each.index): each for each in completions})
            for key, completion in known.items():
                if completion.error:
                    tell(key)

        own = [jobs[place] for place in share]
        for token in llm.run(own, completions, options, keeps_errors=keeps_errors, shows_text=False):
            reports.check()
            num_tokens += 1
            if not known:  # all are there before the first token
                tell_errors()
            if token.is_last:
                tell((token.index, token.completion))
        if not known:  # nor was there a token
            tell_errors()
