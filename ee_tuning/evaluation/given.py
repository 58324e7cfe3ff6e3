"""Metrics of given texts: the likeliest of several choices, and the likelihood of an answer.

Texts are teacher-forced: each token's probability is that of the exit at which its position would leave (see
ee_tuning/generation/scoring.py), so speculation equals full depth. Nothing is generated, and times mean nothing.
"""

from collections import Counter
from collections.abc import Sequence

from ee_tuning.evaluation.points import Point
from ee_tuning.evaluation.readings import ItemResult
from ee_tuning.evaluation.task import Task, TaskItem
from ee_tuning.generation.llm import EarlyExitLLM, Job
from ee_tuning.generation.scoring import Score, TokenPair, score, score_by

BY_LENGTH = "choice by length"
_ROWS = 32


def given_readings(
    llm: EarlyExitLLM,
    task: Task,
    places: Sequence[int],
    jobs: Sequence[Job],
    points: Sequence[Point],
    against: EarlyExitLLM | None = None,
) -> list[list[ItemResult]]:
    """Scores the prompts at `places` of the task, whose jobs are `jobs`, under each point, full depth first: that of
    `against`, where it is another model's.
    """
    texts = [given_texts(task, task.items[place]) for place in places]
    by_point = _scored(llm, [jobs[place] for place in places], texts, points, against)
    return [
        [
            _reading(task, place, point, scores[number], by_point[0][number])
            for point, scores in zip(points, by_point, strict=True)
        ]
        for number, place in enumerate(places)
    ]


def given_texts(task: Task, item: TaskItem) -> tuple[str, ...]:
    """Returns the texts to score: the choices or the answer; none where the task generates."""
    return item.choices if task.metric == "choice" else item.answers if task.metric == "perplexity" else ()


def token_pair(llm: EarlyExitLLM, job: Job, text: str) -> TokenPair:
    """Tokenizes the prompt as in decoding, and the text after it.

    The text is tokenized together with the prompt, or alone where that would change the prompt's last token. Raises
    InputError where both together are too long.
    """
    prompt, whole = (llm.encode(each, job.adds_special_tokens) for each in (job.prompt, job.prompt + text))
    return prompt, whole[len(prompt) :] if whole[: len(prompt)] == prompt and len(whole) > len(prompt) else llm.encode(
        text, False
    )


def _scored(
    llm: EarlyExitLLM,
    jobs: Sequence[Job],
    texts: Sequence[tuple[str, ...]],
    points: Sequence[Point],
    against: EarlyExitLLM | None,
) -> list[list[list[Score]]]:
    """Returns the score, under each point, of each text after each prompt."""
    pairs = [token_pair(llm, job, text) for job, each in zip(jobs, texts, strict=True) for text in each]
    policies = [point.policy for point in points]
    if against is None:
        scored = score_by(llm.model, pairs, policies, _ROWS)
    else:
        scored = [score(against.model, pairs, policies[0], _ROWS), *score_by(llm.model, pairs, policies[1:], _ROWS)]
    return [[[next(scores) for _ in each] for each in texts] for scores in map(iter, scored)]


def _reading(task: Task, place: int, point: Point, scores: list[Score], full: list[Score]) -> ItemResult:
    exits = dict(sorted(Counter(layer for score in scores for layer in score.exit_layers).items()))
    item = task.items[place]
    if task.metric == "perplexity":
        return ItemResult(
            task=task.name,
            item=place,
            point=point.name,
            scores={task.metric: -scores[0].logprob},
            exits=exits,
            weight=float(len(scores[0].token_ids)),
        )
    chosen, by_length = likeliest(item, scores)
    return ItemResult(
        task=task.name,
        item=place,
        point=point.name,
        exits=exits,
        text=item.choices[chosen],
        scores={task.metric: float(chosen == item.right), BY_LENGTH: float(by_length == item.right)},
        is_same=chosen == likeliest(item, full)[0],
    )


def likeliest(item: TaskItem, scores: Sequence[Score]) -> tuple[int, int]:
    """Returns the index of the choice with the highest log-likelihood, and of that with the highest per character; the
    first of equals.
    """
    places = range(len(item.choices))
    return (
        max(places, key=lambda at: scores[at].logprob),
        max(places, key=lambda at: scores[at].logprob / len(item.choices[at])),
    )
