"""Decodes jobs on all replicas of a model (data parallelism). Rank 0 receives completions as they are finished."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ee_tuning.config import GenerationSection
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.job import CHARACTERS_OF_TOKEN, READ_FOR_ONE_MADE, Job
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.reports import Reports
from ee_tuning.storage.work_partition import share_of


class _Made(NamedTuple):
    """A report of a replica to rank 0."""

    num_tokens: int
    """Tokens since its last report."""
    job: int
    completion: Completion


def work_of(job: Job) -> int:
    """Estimates the cost of a job from the length of its prompt and the longest possible completions."""
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
    """Decodes the jobs, and calls `take` on rank 0 once for each completion or error, with its job's place, soon after
    it is finished. All ranks call it with the same jobs, and return when all jobs are done.

    `keeps_errors` as in `EarlyExitLLM.run`. If one rank fails, all raise; see Reports.
    """
    topology = llm.model.topology
    share = share_of({place: work_of(job) for place, job in enumerate(jobs)}, topology.dp_rank, topology.dp)
    reports_tokens = topology.stage == 0 and topology.tp_rank == 0  # all ranks of a replica have the same tokens
    num_tokens, reported = 0, set[tuple[int, int]]()
    completions: list[Completion] = []
    known: dict[tuple[int, int], Completion] = {}
    """Place of the job in the share, and number of the completion -> completion."""

    def take_made(made: _Made) -> None:
        count_tokens(made.num_tokens)
        take(made.job, made.completion)

    with Reports(topology, take_made) as reports:

        def report(key: tuple[int, int]) -> None:
            nonlocal num_tokens
            if reports_tokens and key not in reported:
                reported.add(key)
                reports.put(_Made(num_tokens, share[key[0]], known[key]))
                num_tokens = 0

        def report_errors() -> None:
            known.update({(each.prompt_index, each.index): each for each in completions})
            for key, completion in known.items():
                if completion.error:
                    report(key)

        own = [jobs[place] for place in share]
        for token in llm.run(own, completions, options, keeps_errors=keeps_errors, shows_text=False):
            reports.check()
            num_tokens += 1
            if not known:  # all are there before the first token
                report_errors()
            if token.is_last:
                report((token.index, token.completion))
        if not known:  # nor was there a token
            report_errors()
