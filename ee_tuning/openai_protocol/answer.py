"""Answers as OpenAI's API has them, whole or in chunks; the common part of both kinds of completions."""

import secrets
import time
from abc import ABC, abstractmethod
from typing import Any

from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.job import Job
from ee_tuning.generation.record import IMPOSSIBLE
from ee_tuning.generation.scoring import Score
from ee_tuning.openai_protocol.schemas import SamplingBody
from ee_tuning.openai_protocol.token_texts import TokenTexts

Json = dict[str, Any]


class Answer(ABC):
    """The answer to one request: choice c is completion c mod n of prompt c div n."""

    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(self, body: SamplingBody, jobs: list[Job], model_name: str, texts: TokenTexts):
        self.jobs, self.texts = jobs, texts
        self.n = jobs[0].params.n
        self.id = self.id_prefix + secrets.token_hex(16)
        self._begins = {"id": self.id, "created": int(time.time()), "model": model_name}
        self._tells_exits = bool(body.return_exit_layers)
        self._tells_ids = bool(body.return_token_ids)
        options = body.stream_options
        self._counts_at_end = bool(options is not None and options.include_usage)
        self._counts_always = self._counts_at_end and bool(options is not None and options.continuous_usage_stats)
        self._num_streamed = 0

    def choice_of(self, place: int, completion: int) -> int:
        """Returns the index of the choice."""
        return place * self.n + completion

    def whole(self, completions: list[Completion]) -> Json:
        """Returns the answer; `completions` are in the order of choices."""
        choices = [
            {
                "index": index,
                **self.whole_choice(index, done),
                "finish_reason": self.finish_reason(index, done),
                **self._own(done),
            }
            for index, done in enumerate(completions)
        ]
        return {**self._begins, "object": self.kind, "choices": choices, "usage": self.usage(completions)}

    def first_chunks(self) -> list[Json]:
        """Returns the first chunks of a stream."""
        return []

    def take_prompt(self, place: int, score: Score) -> list[Json]:
        """Takes the log-probabilities of a prompt, and returns the chunks that they add to a stream."""
        return []

    def chunk(self, place: int, token: StreamedToken) -> Json | None:
        """Returns the chunk of a token; None where it adds nothing to the stream yet."""
        index = self.choice_of(place, token.completion)
        self._num_streamed += 1
        told = self.token_choice(index, token)
        if not (token.text or token.is_last or self._tells_exits or self._tells_ids or token.logprob is not None):
            return None
        if self._tells_exits:
            told |= {"exit_layers": [token.exit_layer], "confidences": [round(token.confidence, 6)]}
        if self._tells_ids:
            told["token_ids"] = [token.token_id]
        return self.as_chunk([{"index": index, **told, "finish_reason": None}])

    def last_chunk(self, place: int, completion: Completion) -> Json:
        """Returns the last chunk of a choice."""
        index = self.choice_of(place, completion.index)
        reason = self.finish_reason(index, completion)
        return self.as_chunk([{"index": index, **self.end_choice(), "finish_reason": reason}])

    def take(self, place: int, token: StreamedToken) -> None:  # noqa: B027
        """Takes a token of a whole answer, before `whole`."""

    def finish_reason(self, index: int, completion: Completion) -> str:
        """Returns the reason for the end of a choice."""
        return completion.finish_reason

    def end_chunks(self, completions: list[Completion]) -> list[Json]:
        """Returns the last chunks of a stream."""
        return [{**self.as_chunk([]), "usage": self.usage(completions)}] if self._counts_at_end else []

    def as_chunk(self, choices: list[Json]) -> Json:
        """Returns a chunk with these choices."""
        so_far = self._counted(self._num_streamed) if self._counts_always else None
        usage = {"usage": so_far} if self._counts_at_end else {}
        return {**self._begins, "object": self.chunk_kind, "choices": choices, **usage}

    def usage(self, completions: list[Completion]) -> Json:
        """Returns the number of tokens of prompts, each counted once, and of completions."""
        cached = sum(done.statistics.num_reused for done in completions if done.index == 0)
        made = sum(len(done.token_ids) for done in completions)
        return {**self._counted(made), "prompt_tokens_details": {"cached_tokens": cached}}

    def _counted(self, made: int) -> Json:
        prompt = sum(len(job.prompt_ids) for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    @abstractmethod
    def whole_choice(self, index: int, done: Completion) -> Json:
        """Returns the text of a choice and its log-probabilities."""

    @abstractmethod
    def token_choice(self, index: int, token: StreamedToken) -> Json:
        """Returns the text of one token and its log-probabilities."""

    @abstractmethod
    def end_choice(self) -> Json:
        """Returns the empty text that ends a choice."""

    def _own(self, done: Completion) -> Json:
        told: Json = {}
        if self._tells_exits:
            told |= {"exit_layers": done.exit_layers, "confidences": [round(value, 6) for value in done.confidences]}
        return told | ({"token_ids": done.token_ids} if self._tells_ids else {})


def said(logprob: float) -> float:
    """Returns a log-probability in JSON, which can not express minus infinity."""
    return max(logprob, IMPOSSIBLE)
