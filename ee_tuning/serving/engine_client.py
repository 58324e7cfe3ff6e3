"""The asyncio side of the engine's thread: submits requests with their jobs, and receives their tokens, each request by
its own queue.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

from ee_tuning.generation.completion import Completion
from ee_tuning.generation.job import Job
from ee_tuning.openai_protocol.api_errors import ApiError
from ee_tuning.serving.engine_loop import Abort, Add, EngineLoop, TokenEvent
from ee_tuning.serving.metrics import Metrics

_DIED = "the engine has failed; the server's log says why, and it has to be started again"


class EngineClient:
    """The unfinished requests. All methods are called in the event loop's thread, except where they say otherwise."""

    def __init__(self, metrics: Metrics, *, num_slots: int, max_queue: int):
        self.num_slots, self.max_queue = num_slots, max_queue
        self.num_unfinished = 0
        """Completions that run or wait."""
        self.is_draining = False
        """Whether new requests are refused because the server is about to end."""
        self._metrics = metrics
        self._engine: EngineLoop | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._requests: dict[int, RunningRequest] = {}
        self._numbers = itertools.count()

    def connect(self, engine: EngineLoop, event_loop: asyncio.AbstractEventLoop) -> None:
        """Connects to `engine`, which must call `deliver` and `died` from its own thread."""
        self._engine, self._event_loop = engine, event_loop

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._engine is not None and self._engine.error is None

    def deliver(self, events: list[TokenEvent]) -> None:
        """Takes tokens of the engine, in its thread."""
        self._call_in_loop(self._deliver, events)

    def died(self) -> None:
        """Ends all requests, called in the engine's thread."""
        self._call_in_loop(self._fail_all)

    def submit(self, jobs: list[Job], num_top: int | None = None, completes: bool = True) -> "RunningRequest":
        """Begins a request; `num_top` and `completes` are those of Add. Raises ApiError where there is no room in the
        queue, or no engine.
        """
        count, room = sum(job.params.n for job in jobs), self.num_slots + self.max_queue
        if self.is_draining:
            raise ApiError(503, "the server is shutting down and takes no new requests; ask another one", retry_after=5)
        if not self.is_alive or self._engine is None:
            raise ApiError(503, _DIED)
        if count > room:
            raise ApiError(
                400,
                f"prompts × n must be at most {room}, the completions that may run and wait, got {count}; send several "
                "requests, or start the server with a larger --max-queue",
                param="n",
            )
        if self.num_unfinished + count > room:
            raise ApiError(
                429,
                f"{self.num_unfinished} completions run or wait, and at most {room} may (--max-queue {self.max_queue}); "
                "try again later",
                code="rate_limit_exceeded",
                retry_after=1,
            )
        request = RunningRequest(self, jobs)
        self.num_unfinished += count
        for place, job in enumerate(jobs):
            index = next(self._numbers)
            request.places[index] = place
            self._requests[index] = request
            self._engine.send(Add(index, job, num_top, completes))
        return request

    def finish(self, request: "RunningRequest") -> None:
        """Ends a request: unfinished completions are aborted, and their memory is freed before the next step."""
        for index, place in request.places.items():
            if self._requests.pop(index, None) is not None and self._engine is not None:
                self._engine.send(Abort(index))
                self._metrics.count_aborted(index, request.num_unfinished_of[place])
        self.num_unfinished -= request.num_unfinished
        request.num_unfinished = 0

    def _deliver(self, events: list[TokenEvent]) -> None:
        self._metrics.count_tokens(
            [event.token for event in events if event.token is not None and event.index in self._requests]
        )
        for event in events:
            request = self._requests.get(event.index)
            if request is None:
                continue  # it was aborted meanwhile
            if event.completion is not None:
                self._metrics.count_completion(event.completion)
                request.completions.append(event.completion)
                place = request.places[event.index]
                request.num_unfinished_of[place] -= 1
                request.num_unfinished -= 1
                self.num_unfinished -= 1
                if not request.num_unfinished_of[place]:
                    del self._requests[event.index]
            request.put(event)

    def _fail_all(self) -> None:
        for request in set(self._requests.values()):
            request.put(TokenEvent(-1, error=_DIED))

    def _call_in_loop(self, function: Callable[..., None], *args: Any) -> None:
        if self._event_loop is not None and not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(function, *args)


class RunningRequest:
    """The completions of one HTTP request. `close` it in any case."""

    def __init__(self, client: EngineClient, jobs: list[Job]):
        self.jobs = jobs
        self.places: dict[int, int] = {}
        """Index of a job in the engine -> its place in `jobs`."""
        self.num_unfinished_of = [job.params.n for job in jobs]
        """Number of unfinished completions of each job."""
        self.num_unfinished = sum(self.num_unfinished_of)
        self.completions: list[Completion] = []
        """Finished completions."""
        self.at_close: Callable[[list[Completion]], None] | None = None
        """Called once with the finished completions when the request is closed."""
        self._num_unread = self.num_unfinished
        self._client = client
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()

    def put(self, event: TokenEvent) -> None:
        """Takes a token."""
        self._events.put_nowait(event)

    async def events(self) -> AsyncIterator[list[tuple[int, TokenEvent]]]:
        """Yields (place of the job, event): all events that have arrived, then the next ones, until all completions are
        finished. Raises ApiError where one fails, after the events before it.
        """
        while self._num_unread:
            events, found = [await self._events.get()], list[tuple[int, TokenEvent]]()
            while not self._events.empty():
                events.append(self._events.get_nowait())
            failure = None
            for event in events:
                failure = self._failure(event)
                if failure is not None:
                    break
                self._num_unread -= event.completion is not None
                found.append((self.places[event.index], event))
            if found:
                yield found
            if failure is not None:
                raise failure

    def _failure(self, event: TokenEvent) -> ApiError | None:
        if event.error:
            return ApiError(500 if event.error == _DIED else 400, event.error)
        if event.completion is not None and event.completion.error:
            return ApiError(500, event.completion.error)
        return None

    def close(self) -> None:
        """Aborts the unfinished completions."""
        self._client.finish(self)
        at_close, self.at_close = self.at_close, None
        if at_close is not None:
            at_close(self.completions)
