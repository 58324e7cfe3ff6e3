"""A completion, and its assembly token by token."""

import time
from collections import Counter
from dataclasses import dataclass, field

from ee_tuning.engine.engine import TokenStep
from ee_tuning.engine.sequence import Sequence, SequenceStatistics
from ee_tuning.generation.text import TextStream


@dataclass(kw_only=True)
class Completion:
    """The completion of a prompt, or one of several."""

    prompt: str
    prompt_index: int = 0
    """The prompt's place among the prompts."""
    index: int = 0
    """The completion's number among those of its prompt."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    """The layer at which each token left; the number of layers where it did not leave early."""
    confidences: list[float] = field(default_factory=list)
    """The confidence of each token where it left."""
    logprobs: list[float] = field(default_factory=list)
    """The log-probability of each token in the distribution it was drawn from, if requested."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """The likeliest ids at each token with their log-probabilities, if requested."""
    finish_reason: str = ""
    """stop: end of text, a stop token or a stop string. length: max_new_tokens or the end of the context. error: see
    `error`.
    """
    error: str = ""
    """The reason where there is no completion."""
    statistics: SequenceStatistics = field(default_factory=SequenceStatistics, repr=False)
    seconds: float = 0.0
    """Seconds from the call to the end of this completion."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens of this completion ÷ its seconds, reading the prompt included."""
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    @property
    def mean_depth(self) -> float:
        """Mean of `exit_layers`."""
        return sum(self.exit_layers) / len(self.exit_layers) if self.exit_layers else 0.0

    @property
    def exit_histogram(self) -> dict[int, int]:
        """Layer -> tokens that left there, shallow to deep."""
        return dict(sorted(Counter(self.exit_layers).items()))

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that the full model agreed with; None where nothing was drafted."""
        return self.statistics.num_accepted / self.statistics.num_drafted if self.statistics.num_drafted else None


@dataclass(frozen=True)
class StreamedToken:
    """A token of a stream."""

    index: int
    """The prompt's place among the prompts."""
    text: str
    """Text that can be shown now: empty while a character is incomplete or a stop string may have begun."""
    exit_layer: int
    confidence: float
    is_last: bool
    completion: int = 0
    """Number of its completion among the prompt's."""
    token_id: int = -1
    """Token id; -1 where an error ended the completion at this position."""
    logprob: float | None = None
    """The token's log-probability in the distribution that it was drawn from, if requested."""
    top_logprobs: dict[int, float] | None = None
    """The likeliest ids at this position with their log-probabilities, if requested."""


@dataclass
class Writer:
    """Assembles a completion from the tokens of its sequence."""

    prompt_index: int
    sequence: Sequence
    completion: Completion
    stream: TextStream
    started: float
    """Time by `time.perf_counter` from which its seconds count."""
    shows_text: bool = True
    """Whether each token gets its text, and stop strings are searched."""

    def fail(self, step: TokenStep, error: str) -> StreamedToken:
        """Ends the completion with an error. The token of this step is dropped."""
        self.completion.finish_reason, self.completion.error = "error", error
        return StreamedToken(self.prompt_index, "", step.exit_layer, step.confidence, True, self.completion.index)

    def take(self, step: TokenStep) -> StreamedToken:
        """Adds a token, and sets the finish reason where the completion ends, also by a stop string."""
        done, params = self.completion, self.sequence.params
        done.token_ids.append(step.token_id)
        done.exit_layers.append(step.exit_layer)
        done.confidences.append(step.confidence)
        if step.logprob is not None and step.top_logprobs is not None:
            done.logprobs.append(step.logprob)
            done.top_logprobs.append(step.top_logprobs)
        is_last_of_sequence = len(done.token_ids) == self.sequence.num_output
        ends = self.sequence.finish_reason if is_last_of_sequence else ""
        # A structured output ends with a token of the text.
        is_left_out = ends == "stop" and step.token_id in self.sequence.stop_ids
        shown = ""
        if not is_left_out and not self.shows_text:
            self.stream.hold(step.token_id)
        elif not is_left_out:
            self.stream.stop = params.stop if len(done.token_ids) >= params.min_tokens else ()
            shown = self.stream.push(step.token_id)
        done.finish_reason = "stop" if self.stream.has_stopped else ends
        if done.finish_reason:
            shown += self.stream.flush()
            done.text, done.statistics = self.stream.text, self.sequence.statistics
            done.seconds = time.perf_counter() - self.started
        return StreamedToken(
            self.prompt_index,
            shown,
            step.exit_layer,
            step.confidence,
            bool(done.finish_reason),
            done.index,
            step.token_id,
            step.logprob,
            step.top_logprobs,
        )
