"""The endpoints that decode: /v1/completions and /v1/chat/completions."""

import asyncio
import functools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request, Response

from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.openai_protocol.answer import Answer, Json
from ee_tuning.openai_protocol.api_errors import ApiError
from ee_tuning.openai_protocol.chat_answer import ChatAnswer
from ee_tuning.openai_protocol.responses import EventStream, StrictJson, unless_client_leaves
from ee_tuning.openai_protocol.schemas import ChatCompletionBody, CompletionBody, SamplingBody
from ee_tuning.openai_protocol.strict_request import StrictRoute
from ee_tuning.openai_protocol.text_answer import TextAnswer
from ee_tuning.openai_protocol.token_texts import TokenTexts
from ee_tuning.serving.engine_client import EngineClient, RunningRequest
from ee_tuning.serving.metrics import Metrics
from ee_tuning.serving.request_jobs import RequestJobs
from ee_tuning.serving.tracing import TracedRequest, Tracing

_tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
"""One thread for the tokenizer: templates and long prompts take time, and a tokenizer must not be used by several
threads.
"""


async def in_tokenizer_thread(function: Any, *args: Any) -> Any:
    """Awaits a call that uses the tokenizer."""
    return await asyncio.get_running_loop().run_in_executor(_tokenizing, function, *args)


class CompletionsApi:
    """Both endpoints for one model."""

    def __init__(
        self,
        client: EngineClient,
        jobs: RequestJobs,
        metrics: Metrics,
        model_names: tuple[str, ...],
        request_timeout: float,
        tracing: Tracing | None = None,
    ):
        self._client, self._jobs, self._metrics = client, jobs, metrics
        self._names, self._seconds, self._tracing = model_names, request_timeout, tracing
        self._texts = TokenTexts(jobs.llm.tokenizer)
        self.router = APIRouter(route_class=StrictRoute)
        for path, endpoint in (("/v1/completions", self.complete), ("/v1/chat/completions", self.chat)):
            self.router.add_api_route(path, endpoint, methods=["POST"], response_class=StrictJson)

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Completes texts."""
        name = self.model_name(body.model)
        _check_stream_options(body)
        jobs, prompts = await in_tokenizer_thread(self._text_jobs, body)
        completes = body.max_tokens != 0
        num_top = (body.logprobs or 0) if body.echo and (body.logprobs is not None or not completes) else None
        running = self._client.submit(jobs, num_top, completes)
        return await self._answer(body, TextAnswer(body, jobs, name, self._texts, prompts), running, request)

    async def chat(self, body: ChatCompletionBody, request: Request) -> Response:
        """Answers a chat."""
        name = self.model_name(body.model)
        _check_stream_options(body)
        job = await in_tokenizer_thread(self._jobs.chat_job, body)
        use = self._jobs.tool_use(body)
        running = self._client.submit([job])
        answer = ChatAnswer(body, [job], name, self._texts, use, self._jobs.llm.special)
        return await self._answer(body, answer, running, request)

    def model_name(self, asked: str | None) -> str:
        """Returns the model that a request names. Raises ApiError where there is no such model."""
        if asked is not None and asked not in self._names:
            raise ApiError(
                404,
                f"model must be one of {', '.join(self._names)}, got {asked[:100]!r}; /v1/models lists them",
                param="model",
                code="model_not_found",
            )
        return asked or self._names[0]

    def _text_jobs(self, body: CompletionBody) -> tuple[list[Any], list[str]]:
        jobs = self._jobs.completion_jobs(body)
        return jobs, [job.prompt or self._jobs.llm.decode(list(job.prompt_ids)) for job in jobs]

    async def _answer(self, body: SamplingBody, answer: Answer, running: RunningRequest, request: Request) -> Response:
        for job in answer.jobs:
            self._metrics.count_prompt(len(job.prompt_ids), job.params.n)
        if self._tracing is not None:
            state = request.state
            traced = TracedRequest(state.request_id, state.began, request.headers, answer.jobs)
            running.at_close = functools.partial(self._tracing.end_request, traced)
        if body.stream:
            return EventStream(_chunks(answer, running), running.close, self._seconds)
        try:
            whole = await unless_client_leaves(request, _whole(answer, running), self._seconds)
        finally:
            running.close()
        return StrictJson(whole)


async def _whole(answer: Answer, running: RunningRequest) -> Json:
    finished: dict[int, Completion] = {}
    async for events in running.events():
        for place, event in events:
            if event.score is not None:
                answer.take_prompt(place, event.score)
            if event.token is not None:
                answer.take(place, event.token)
            if (done := event.completion) is not None:
                finished[answer.choice_of(place, done.index)] = done
    return answer.whole([finished[index] for index in sorted(finished)])


async def _chunks(answer: Answer, running: RunningRequest) -> AsyncIterator[list[Json]]:
    """Yields lists of chunks that can be sent together: if the event loop is behind the engine, it catches up."""
    finished: list[Completion] = []
    yield answer.first_chunks()
    async for events in running.events():
        chunks: list[Json] = []
        for place, event in events:
            if event.score is not None:
                chunks += answer.take_prompt(place, event.score)
            if event.token is not None and (told := answer.chunk(place, event.token)) is not None:
                chunks.append(told)
            if event.completion is not None:
                finished.append(event.completion)
                chunks.append(answer.last_chunk(place, event.completion))
        yield chunks
    yield answer.end_chunks(finished)


def _check_stream_options(body: SamplingBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InputError("stream_options needs stream true, got it without; leave it out")
