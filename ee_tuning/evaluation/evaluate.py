"""Evaluates early-exit policies against full depth on tasks: completions, their quality, and their time.

    from ee_tuning import EarlyExitLLM
    from ee_tuning.evaluation.evaluate import evaluate
    from ee_tuning.evaluation.points import PolicySweep, points_of
    from ee_tuning.evaluation.task import read_task
    llm = EarlyExitLLM.load("path/to/model", "path/to/exit_heads")
    points = points_of(llm, PolicySweep(thresholds=(0.9, 0.8)))
    found = evaluate(llm, [read_task(Path("task.jsonl"), "contains")], points)
    print(found.tasks[0].points[1].speedup)

A group of prompts (one prompt, where batch_size is 1) is decoded under every policy before the next group, in an order
drawn for each group: a slow moment of the machine affects all policies alike. No policy reuses cached keys and values
of another one.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ee_tuning.config import GenerationSection
from ee_tuning.data.chat_template import ChatTemplate
from ee_tuning.errors import InputError
from ee_tuning.evaluation.figures import Evaluation, task_result
from ee_tuning.evaluation.given import given_readings, given_texts, token_pair
from ee_tuning.evaluation.points import FULL_DEPTH, Point, PolicySweep, points_of
from ee_tuning.evaluation.readings import ItemResult
from ee_tuning.evaluation.task import Task, TaskItem
from ee_tuning.evaluation.text_metrics import Score, score_of
from ee_tuning.generation.chat import stop_ids_of
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.llm import EarlyExitLLM, Job
from ee_tuning.generation.options import params_of, with_options
from ee_tuning.generation.replicas import over_replicas
from ee_tuning.sampling.exit_fusion import check_one_head
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL

BLOCK = 8
WARM_TOKENS = 16
"""New tokens under each policy before anything is timed, so that memory is allocated and kernels are built."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Procedure:
    """Settings of the measurement."""

    batch_size: int = 1
    """Prompts decoded at a time on each replica."""
    block: int = 0
    """Prompts measured under all policies before they are stored; 0: 8, or a batch on each replica if that is more."""
    repeats: int = 1
    """Number of times that a group is decoded under each policy; the shortest time counts."""
    chat_template: str | None = None
    """The template that `read_chat_template` returned; None for the tokenizer's own."""
    seed: int = 0
    """Seed of the order of the policies, and of the intervals."""

    def block_size(self, num_replicas: int) -> int:
        """Returns the number of prompts in a block."""
        return self.block or max(BLOCK, self.batch_size * num_replicas)


class Block(NamedTuple):
    """Prompts of one task that are measured and stored together."""

    number: int
    task: Task
    first: int
    """Index of its first prompt."""
    size: int

    @property
    def items(self) -> range:
        """Indices of its prompts."""
        return range(self.first, self.first + self.size)


def evaluate(
    llm: EarlyExitLLM,
    tasks: Sequence[Task],
    points: Sequence[Point] | None = None,
    procedure: Procedure | None = None,
    *,
    known: Mapping[int, list[ItemResult]] | None = None,
    on_block: Callable[[Block, list[ItemResult]], None] = lambda block, readings: None,
    on_prompts: Callable[[int], None] = lambda count: None,
    against: EarlyExitLLM | None = None,
) -> Evaluation:
    """Measures every task under every point, full depth first; the default points are those of PolicySweep. Full depth
    is that of `against`, where given: another model with the same tokenizer.

    All ranks call it, with the same results. `llm.defaults` holds max_new_tokens, stop and the like; tokens must be
    greedy. Blocks in `known`, by number, are not measured again; `on_block` is called after each measured block, and
    `on_prompts` after a number of this replica's prompts. Raises InputError, before anything is decoded, on an unusable
    prompt.
    """
    points = list(points_of(llm, PolicySweep()) if points is None else points)
    assert points and points[0].kind == "full"
    procedure, known = procedure or Procedure(), known or {}
    runner = BlockRunner(llm, points, procedure, on_prompts, against)
    asked = {task.name: runner.jobs_of(task) for task in tasks}
    readings = [reading for part in known.values() for reading in part]
    is_warm = False
    for block in blocks_of(tasks, procedure.block_size(llm.model.topology.dp)):
        if block.number in known:
            continue
        if block.task.text_metric is not None and not is_warm:
            runner.warm([job for task in tasks if task.text_metric is not None for job in asked[task.name]])
            is_warm = True
        found = runner.measure(block, asked[block.task.name])
        readings += found
        on_block(block, found)
    results = [
        task_result(task, points, [each for each in readings if each.task == task.name], seed=procedure.seed)
        for task in tasks
    ]
    return Evaluation(num_layers=(against or llm).num_layers, tasks=results, readings=readings)


def blocks_of(tasks: Sequence[Task], size: int) -> list[Block]:
    """Returns all prompts of all tasks, in order."""
    places = [(task, first) for task in tasks for first in range(0, len(task.items), size)]
    return [
        Block(number, task, first, min(size, len(task.items) - first)) for number, (task, first) in enumerate(places)
    ]


class BlockRunner:
    """Decodes prompts under all points in turn."""

    def __init__(
        self,
        llm: EarlyExitLLM,
        points: Sequence[Point],
        procedure: Procedure,
        on_prompts: Callable[[int], None] = lambda count: None,
        against: EarlyExitLLM | None = None,
    ):
        """`against` is the model of full depth, by default `llm`."""
        self.llm, self.points, self.procedure, self.on_prompts = llm, points, procedure, on_prompts
        self.against = against
        self.template = ChatTemplate(llm.tokenizer, procedure.chat_template)
        self.options: GenerationSection = with_options(
            llm.defaults, {"max_batch_size": procedure.batch_size, "reuse_prefixes": False}
        )
        self._plain = greedy_params(llm.defaults)
        self._in_chats = dataclasses.replace(self._plain, stop_token_ids=stop_ids_of(llm, self.template))

    def _llm(self, point: Point) -> EarlyExitLLM:
        return self.against if self.against is not None and point.kind == "full" else self.llm

    def jobs_of(self, task: Task) -> list[Job]:
        """Returns the jobs of a task's prompts. Raises InputError, naming its line, where one is impossible."""
        return [self._job(item, task) for item in task.items]

    def _job(self, item: TaskItem, task: Task) -> Job:
        try:
            text = (
                item.prompt
                if item.prompt is not None
                else self.template.render(item.messages, add_generation_prompt=True)
            )
            params = self._plain if item.prompt is not None else self._in_chats
            params = dataclasses.replace(
                params, max_tokens=item.max_new_tokens or params.max_tokens, stop=(*params.stop, *item.stop)
            )
            params.check(self.llm.model.config.vocab_size)
            job = Job(text, params, FULL, adds_special_tokens=item.prompt is not None)
            self._ids(job)
            for given in given_texts(task, item):
                token_pair(self.llm, job, given)
        except InputError as error:
            raise InputError(f"{item.where}: {error}") from error
        return job

    def warm(self, jobs: Sequence[Job]) -> None:
        """Decodes a little under each policy, in an engine that then has memory for all of `jobs`."""
        longest = max(jobs, key=lambda job: len(self._ids(job)) + job.params.max_tokens)
        for point in self.points:
            tokens = self._llm(point).run(
                [dataclasses.replace(longest, policy=point.policy)] * self.procedure.batch_size,
                [],
                self.options,
                shows_text=False,
            )
            for _ in itertools.islice(tokens, WARM_TOKENS * self.procedure.batch_size):
                pass
            tokens.close()

    def measure(self, block: Block, jobs: Sequence[Job]) -> list[ItemResult]:
        """Measures each prompt of the block under each point. `jobs` are the task's."""
        topology, metric = self.llm.model.topology, block.task.text_metric
        score = None if metric is None else score_of(metric)

        def measure_share(places: list[int]) -> list[list[ItemResult]]:
            if score is None:
                return given_readings(self.llm, block.task, places, jobs, self.points, self.against)
            size = self.procedure.batch_size
            groups = [places[at : at + size] for at in range(0, len(places), size)]
            return [readings for group in groups for readings in self._measure_group(block, jobs, group, score)]

        found = over_replicas(block.items, measure_share, topology)
        size = topology.dp * self.procedure.batch_size
        groups = [f"{block.number}.{place % topology.dp}.{place // size}" for place in range(block.size)]
        return [
            dataclasses.replace(each, group=group) for group, own in zip(groups, found, strict=True) for each in own
        ]

    def _measure_group(
        self, block: Block, jobs: Sequence[Job], places: Sequence[int], score: Score
    ) -> Iterator[list[ItemResult]]:
        """Measures these prompts."""
        order = list(self.points)
        random.Random(f"{self.procedure.seed}/{block.task.name}/{places[0]}").shuffle(order)
        fastest = dict[str, tuple[float, list[Completion]]]()
        for _ in range(self.procedure.repeats):
            for point in order:
                said = list[Completion]()
                for _ in self._llm(point).run(
                    [dataclasses.replace(jobs[place], policy=point.policy) for place in places],
                    said,
                    self.options,
                    shows_text=False,
                ):
                    pass
                seconds = max(completion.seconds for completion in said)
                fastest[point.name] = min(
                    fastest.get(point.name, (seconds, said)), (seconds, said), key=lambda each: each[0]
                )
        full = fastest[FULL_DEPTH.name][1]
        for number, place in enumerate(places):
            yield [
                self._reading(
                    block,
                    place,
                    point,
                    jobs[place],
                    fastest[point.name][0],
                    fastest[point.name][1][number],
                    full[number],
                    score,
                )
                for point in self.points
            ]
        self.on_prompts(len(places))

    def _reading(
        self,
        block: Block,
        place: int,
        point: Point,
        job: Job,
        seconds: float,
        said: Completion,
        full: Completion,
        score: Score,
    ) -> ItemResult:
        return ItemResult(
            task=block.task.name,
            item=place,
            point=point.name,
            exits=said.exit_histogram,
            seconds=round(seconds, 6),
            scores={block.task.metric: score(said.text, block.task.items[place].answers)},
            text=said.text,
            num_agreed=self._num_agreed(job, said, full),
            is_same=said.token_ids == full.token_ids,
        )

    def _num_agreed(self, job: Job, said: Completion, full: Completion) -> int:
        """Counts the tokens of `said` that the full model predicts after the same prefix. `full` is the full model's
        own completion.
        """
        ids, own = said.token_ids, full.token_ids
        same = next((at for at, (a, b) in enumerate(zip(ids, own, strict=False)) if a != b), min(len(ids), len(own)))
        if same == len(ids) or (same == len(ids) - 1 and same < len(own)):
            return same  # no token differs, or only the last one
        prompt, whole = self._ids(job), self._llm(FULL_DEPTH)
        assert whole.engine is not None
        wanted = whole.engine.full_model_tokens(prompt + ids[:-1])[len(prompt) - 1 :]
        return sum(a == b for a, b in zip(ids, wanted, strict=True))

    def _ids(self, job: Job) -> list[int]:
        return self.llm.encode(job.prompt, job.adds_special_tokens)


def greedy_params(generation: GenerationSection) -> SamplingParams:
    """Returns the section's sampling parameters, which must be greedy: otherwise agreement and speed would depend on
    random draws.

    Raises InputError where they are not.
    """
    params = params_of(generation)
    check_one_head(generation)
    plain = SamplingParams(
        max_tokens=params.max_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        seed=params.seed,
    )
    for field in dataclasses.fields(SamplingParams):
        here, there = getattr(params, field.name), getattr(plain, field.name)
        if here != there:
            raise InputError(
                f"evaluate decodes greedily, so generation.{field.name} must be {there!r}, got {here!r}; leave it out"
            )
    return plain
