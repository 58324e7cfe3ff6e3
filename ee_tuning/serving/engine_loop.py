"""The engine's thread. It alone touches the engine: commands come by a queue, tokens leave by a callback.

Under torchrun every rank of TP × PP runs the same loop. Rank 0 takes the commands, and sends them to the others before
each step; all ranks then do the same with the same engine.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.completion_runner import CompletionRunner
from ee_tuning.generation.job import Job
from ee_tuning.generation.prompt_scorer import PromptScorer
from ee_tuning.generation.scoring import Score
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog

_HEARTBEAT_SECONDS = 5.0
"""Seconds between messages among ranks while nothing is decoded, so that a dead rank is noticed then, too."""


@dataclass(frozen=True)
class Add:
    """The command to begin a job, whose events have this index."""

    index: int
    job: Job
    num_top: int | None = None
    """Number of likeliest tokens at each place of the prompt, which is then scored first; None without a score."""
    completes: bool = True
    """Whether the prompt is completed; otherwise it is only scored."""


@dataclass(frozen=True)
class Abort:
    """The command to end a job."""

    index: int


@dataclass(frozen=True)
class Stop:
    """The command to end the loop."""


Command = Add | Abort | Stop


@dataclass(frozen=True)
class TokenEvent:
    """A token of a job, the score of its prompt, or the error that ended it."""

    index: int
    token: StreamedToken | None = None
    completion: Completion | None = None
    """The finished record, with its last token, or alone if there is no token."""
    score: Score | None = None
    """Scores of the prompt's tokens after the first one; sent before the first token of the completion."""
    error: str = ""
    """The reason why the engine refused the job."""


class EngineLoop:
    """Executes commands until Stop."""

    def __init__(
        self,
        runner: CompletionRunner,
        topology: Topology,
        deliver: Callable[[list[TokenEvent]], None] = lambda events: None,
        died: Callable[[], None] = lambda: None,
    ):
        """`deliver` is called with the tokens of each step, and `died` after an unexpected error, both in the thread of
        `run`.
        """
        self._runner, self._topology, self._deliver, self._died = runner, topology, deliver, died
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._completions: dict[int, list[Completion]] = {}
        engine = runner.engine
        self._scorer = PromptScorer(engine.model, max_rows=engine.num_slots, max_tokens=engine.scheduler.prefill_chunk)
        self._to_score: dict[int, Add] = {}
        self.error: BaseException | None = None
        """The exception that ended the loop, if any."""
        self._thread = threading.Thread(target=self._run_in_thread, name="engine", daemon=True)

    def send(self, command: Command) -> None:
        """Queues a command, from any thread."""
        self._commands.put(command)

    def start(self) -> None:
        """Starts the loop in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and all unfinished jobs."""
        self.send(Stop())
        self._thread.join()

    def run(self) -> None:
        """Loops until Stop comes. All ranks call it, each in one thread."""
        if self._topology.device.type == "cuda":
            torch.cuda.set_device(self._topology.device)  # each thread has its own current device
        try:
            while True:
                commands = self._next_commands()
                events: list[TokenEvent] = []
                for command in commands:
                    if isinstance(command, Stop):
                        return
                    self._obey(command, events)
                if not self._scorer.is_idle:
                    self._score(events)
                if not self._runner.is_idle:
                    events += [self._event(token) for token in self._runner.step()]
                if events:
                    self._deliver(events)
        finally:
            self._runner.clear()
            self._runner.engine.proposer.keep()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.error = error
            self._died()

    def _next_commands(self) -> list[Command]:
        """Returns the commands since the last step. Waits for one if nothing runs."""
        is_alone = self._topology.num_in_replica == 1
        commands: list[Command] = []
        if self._topology.rank == 0:
            try:
                if self._runner.is_idle and self._scorer.is_idle:
                    commands.append(self._commands.get(timeout=None if is_alone else _HEARTBEAT_SECONDS))
                while True:
                    commands.append(self._commands.get_nowait())
            except queue.Empty:
                pass
        if is_alone:
            return commands
        others = ", ".join(map(str, range(1, self._topology.num_in_replica)))
        with hang_watchdog(self._topology, f"commands from rank 0 to rank {others}"):
            received: list[Command] = self._topology.broadcast_object(commands)
        return received

    def _obey(self, command: Add | Abort, events: list[TokenEvent]) -> None:
        if isinstance(command, Abort):
            self._completions.pop(command.index, None)
            self._to_score.pop(command.index, None)
            self._scorer.abort(command.index)
            self._runner.abort(command.index)
        elif command.num_top is None:
            self._begin(command, events)
        else:
            job = command.job
            self._to_score[command.index] = command
            self._scorer.add(command.index, job.prompt_ids, job.policy, command.num_top, job.priority)

    def _begin(self, command: Add, events: list[TokenEvent]) -> None:
        index, job = command.index, command.job
        if not command.completes:
            for number in range(job.params.n):
                done = Completion(prompt=job.prompt, prompt_index=index, index=number, finish_reason="length")
                events.append(TokenEvent(index, completion=done))
            return
        try:
            self._completions[index] = self._runner.add(job, index)
        except InputError as error:
            events.append(TokenEvent(index, error=str(error)))

    def _score(self, events: list[TokenEvent]) -> None:
        """Scores prompts in one pass, and begins the completions that follow them."""
        for index, found in self._scorer.step():
            command = self._to_score.pop(index)
            if isinstance(found, InputError):
                events.append(TokenEvent(index, error=str(found)))
            else:
                events.append(TokenEvent(index, score=found))
                self._begin(command, events)

    def _event(self, token: StreamedToken) -> TokenEvent:
        done = self._completions[token.index][token.completion] if token.is_last else None
        if done is not None and all(each.finish_reason for each in self._completions[token.index]):
            del self._completions[token.index]
        return TokenEvent(token.index, token, done)
