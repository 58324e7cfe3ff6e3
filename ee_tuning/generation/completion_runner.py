"""Runs completions on an engine: jobs join and leave between steps, and a step returns tokens with their text.

`EarlyExitLLM.run` adds all its jobs at once; the server adds and aborts jobs as requests arrive and end.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping

from ee_tuning.engine.engine import Engine, TokenStep
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion, StreamedToken, Writer
from ee_tuning.generation.job import Job
from ee_tuning.generation.text import TextStream
from ee_tuning.storage.non_finite import no_numbers


class CompletionRunner:
    """The completions of one engine. Every rank of a replica makes the same calls."""

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[list[int]], str],
        special: Mapping[int, str],
        *,
        keeps_errors: bool = True,
    ):
        """`decode` and `special` are those of a TextStream. With `keeps_errors` a completion whose logits are not
        finite ends with its `error`; otherwise `step` raises InputError.
        """
        self.engine = engine
        self._decode, self._special, self._keeps_errors = decode, special, keeps_errors
        self._writers: dict[int, Writer] = {}
        """Sequence number -> the writer of its completion."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self.engine.is_idle

    def add(self, job: Job, index: int, *, started: float | None = None, shows_text: bool = True) -> list[Completion]:
        """Queues the `n` completions of a job with `prompt_ids`, and returns them; each step extends them.

        Each token is returned with `index`. Seconds are counted from `started`, by default now.
        Raises InputError, and queues nothing, where the engine refuses the request.
        """
        ids = list(job.prompt_ids)
        started = time.perf_counter() if started is None else started
        completions = []
        for sequence in self.engine.add_request(ids, job.params, job.policy, job.priority):
            completion = Completion(prompt=job.prompt, prompt_index=index, index=sequence.completion)
            text = TextStream(self._decode, ids, special=self._special)
            self._writers[sequence.number] = Writer(
                index, sequence, completion, text, started, shows_text or bool(job.params.stop)
            )
            completions.append(completion)
        return completions

    def step(self) -> Iterator[StreamedToken]:
        """Runs one step of the engine, and yields the new tokens of all completions."""
        for step in self.engine.step():
            writer = self._writers.get(step.sequence.number)
            if writer is None:
                continue  # follows a stop string that the same step brought
            token = self._booked(writer, step)
            if token.is_last:
                del self._writers[step.sequence.number]
                self.engine.abort(step.sequence, "stop")  # ended by a stop string; otherwise it has left already
            yield token

    def abort(self, index: int) -> None:
        """Ends the completions of a job and frees their memory. No further token of them is yielded."""
        for number, writer in list(self._writers.items()):
            if writer.prompt_index == index:
                del self._writers[number]
                self.engine.abort(writer.sequence)

    def clear(self) -> None:
        """Ends all completions."""
        self._writers.clear()
        self.engine.clear()

    def _booked(self, writer: Writer, step: TokenStep) -> StreamedToken:
        """Adds the token, or an error where its logits are NaN, for which the vocabulary's first token would be
        drawn.
        """
        grammar = step.sequence.grammar
        if math.isnan(step.confidence):
            error = no_numbers(f"the logits behind layer {step.exit_layer}", self.engine.model.plan.dtype)
        elif grammar is not None and grammar.error:
            error = InputError(grammar.error)
        else:
            return writer.take(step)
        if not self._keeps_errors:
            raise error
        return writer.fail(step, str(error))
