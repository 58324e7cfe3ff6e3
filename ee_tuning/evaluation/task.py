"""Task files: JSON lines, each with a prompt (or the messages of a chat) and its right answers.

{"prompt": "2 + 2 =", "answer": "4"}
{"messages": [{"role": "user", "content": "Capital of France?"}], "answers": ["Paris", "Paris, France"], "id": "fr"}
{"prompt": "The sky is", "choices": [" blue", " green"], "answer": 0, "max_new_tokens": 5, "stop": ["\\n"]}
"""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ee_tuning.data.json_lines import read_json_lines
from ee_tuning.data.messages import chat_messages
from ee_tuning.errors import InputError
from ee_tuning.evaluation.text_metrics import TextMetric, score_of
from ee_tuning.json_file import to_json

Metric = Literal["exact", "contains", "rouge-l", "choice", "perplexity"]
METRICS: tuple[Metric, ...] = get_args(Metric)
_KEYS = ("prompt", "messages", "answer", "answers", "choices", "max_new_tokens", "stop", "id")
_MISSPELT = 0.8
"""Similarity to a key from which on another key is taken for its misspelling."""

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskItem:
    """A prompt of a task."""

    where: str
    """File and line, for messages."""
    id: str | int
    """Its own id, or the number of its line."""
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    """Messages instead of a prompt, rendered by a chat template."""
    answers: tuple[str, ...] = ()
    """Right answers."""
    choices: tuple[str, ...] = ()
    """Possible continuations, where the task is to choose."""
    right: int | None = None
    """Index of the right choice."""
    max_new_tokens: int | None = None
    """Limit of this line, instead of the job's."""
    stop: tuple[str, ...] = ()
    """Stop strings of this line, beside the job's."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, and the metric for them."""

    name: str
    metric: Metric
    items: tuple[TaskItem, ...]

    @property
    def text_metric(self) -> TextMetric | None:
        """The metric, if it judges generated text; None if it judges the likelihood of given texts."""
        return None if self.metric == "choice" or self.metric == "perplexity" else self.metric

    def digest(self) -> str:
        """A short identifier of the content."""
        fields = [
            self.metric,
            [{key: value for key, value in asdict(item).items() if key != "where"} for item in self.items],
        ]
        return hashlib.sha256(to_json(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_tasks(
    paths: Sequence[Path], metrics: tuple[Metric, ...], *, limit: int | None = None, taken: Sequence[str] = ()
) -> list[Task]:
    """Reads the tasks, with one metric for all of them or one for each. `taken` are names of other tasks.

    Raises InputError where one can not be used, has another one's name, or a metric's package is missing.
    """
    if len(metrics) not in (1, len(paths)):
        raise InputError(
            f"--metric must be given once for all tasks, or as often as --task ({len(paths)}), got {len(metrics) or 'none'}; "
            f"they are {', '.join(METRICS)}"
        )
    each = metrics if len(metrics) == len(paths) else metrics * len(paths)
    tasks = [read_task(path, metric, limit=limit) for path, metric in zip(paths, each, strict=True)]
    names = [*taken, *(task.name for task in tasks)]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"tasks must have different names, got {double} twice; rename a file")
    for task in tasks:
        if task.text_metric is not None:
            score_of(task.text_metric)
    return tasks


def read_task(path: Path, metric: Metric, *, limit: int | None = None, name: str | None = None) -> Task:
    """Reads a task from a file, or only its first `limit` lines. The default of `name` is the file's name.

    Raises InputError, with its place, where the file can not be read, a line is no task, or `metric` does not fit it.
    """
    if metric not in METRICS:
        raise InputError(f"--metric must be one of {', '.join(METRICS)}, got {metric!r}")
    items = list[TaskItem]()
    for number, line in read_json_lines(path, "--task"):
        if limit is not None and len(items) >= limit:
            break
        items.append(_item(line, f"{path}:{number}", number))
    if not items:
        raise InputError(f"--task must name a file with a prompt, got {path}, which is empty")
    for item in items:
        _check_fit(item, metric)
    return Task(name=name or path.stem, metric=metric, items=tuple(items))


def _item(line: Line, where: str, number: int) -> TaskItem:
    """Parses a line. Raises InputError where it is no task."""
    for key in line.keys() - set(_KEYS):
        if near := difflib.get_close_matches(key, _KEYS, n=1, cutoff=_MISSPELT):
            raise InputError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
    prompt, messages = line.get("prompt"), line.get("messages")
    if (prompt is None) == (messages is None):
        raise InputError(
            f'{where}: a line must have either a "prompt" or "messages", got {"both" if prompt is not None else "neither"}'
        )
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f'{where}: "prompt" must be a text, got {prompt!r:.60}; messages of a chat go into "messages"')
    said = () if messages is None else tuple(chat_messages(messages, "messages", lambda: where))
    if messages is not None and (not said or said[-1]["role"] == "assistant"):
        raise InputError(
            f'{where}: "messages" must end with a message for the model to answer, got {"none" if not said else "an answer"}; the '
            'right answer goes into "answer"'
        )
    choices = _texts(line.get("choices", []), "choices", where)
    answers, right = _answers(line, choices, where)
    limit, stop, own = line.get("max_new_tokens"), line.get("stop", []), line.get("id", number)
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InputError(f'{where}: "max_new_tokens" must be a whole number of at least 1, got {limit!r:.60}')
    stops = _texts([stop] if isinstance(stop, str) else stop, "stop", where)
    if "" in stops:
        raise InputError(f'{where}: a "stop" must not be empty; leave it out to have none')
    if not isinstance(own, str | int):
        raise InputError(f'{where}: "id" must be a text or a whole number, got {own!r:.60}')
    return TaskItem(
        where=where,
        id=own,
        prompt=prompt,
        messages=said,
        answers=answers,
        choices=choices,
        right=right,
        max_new_tokens=limit,
        stop=stops,
    )


def _answers(line: Line, choices: tuple[str, ...], where: str) -> tuple[tuple[str, ...], int | None]:
    """Returns (answers, index of the right choice)."""
    if "answer" in line and "answers" in line:
        raise InputError(f'{where}: a line must have "answer" or "answers", not both')
    answer = line.get("answer")
    if not choices:
        answers = _texts(line.get("answers", [] if answer is None else [answer]), "answers", where)
        if not answers or not all(answers):
            raise InputError(
                f'{where}: a line must have an "answer", "answers" or "choices", got {"an empty one" if answers else "none"}'
            )
        return answers, None
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
        raise InputError(f'{where}: "choices" must be at least two different texts, got {list(choices)!r:.60}')
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise InputError(
            f'{where}: "answer" must be the right one of the {len(choices)} choices, or its place, counted from 0, got '
            f"{answer!r:.60}"
        )
    return (choices[answer],), answer


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InputError(f'{where}: "{key}" must be texts, got {value!r:.60}; put numbers in quotes')
    return tuple(value)


def _check_fit(item: TaskItem, metric: Metric) -> None:
    if metric == "choice" and item.right is None:
        raise InputError(
            f'{item.where}: --metric choice needs "choices", and this line has only answers; exact, contains, rouge-l and '
            "perplexity apply to it"
        )
    if metric == "perplexity" and len(item.answers) > 1:
        raise InputError(
            f"{item.where}: --metric perplexity takes one answer, got {len(item.answers)}; leave the others out"
        )
