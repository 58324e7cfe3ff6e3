"""Text in, text out: the Python interface of the decoder.

    from ee_tuning import EarlyExitLLM
    llm = EarlyExitLLM.load("path/to/model", "path/to/exit_heads")
    print(llm.generate(["def main():"], threshold=0.8)[0].text)

Under torchrun every rank makes the same calls with the same arguments, and every rank gets the same answers.
"""
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ee_tuning.checkpoint.formats import model_folder
from ee_tuning.checkpoint.load import load_for_generation
from ee_tuning.config import Config, GenerationSection, load_config
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.errors import InputError
from ee_tuning.generation.engine import Engine, Sampling, Sequence, TokenStep
from ee_tuning.generation.pieces import Policy, policy_of
from ee_tuning.generation.text import TextStream
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.parallel.topology import Topology, init_parallel


@dataclass(kw_only=True)
class Completion:
    """What was made of one prompt."""

    prompt: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    """Per token the layer it left at; the number of layers where it did not leave early."""
    confidences: list[float] = field(default_factory=list)
    """Per token the largest probability where it left."""
    finish_reason: str = ""
    """stop: end of text or a stop string. length: max_new_tokens or the end of the context."""
    seconds: float = 0.0
    """From the call until this completion's end."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens of this completion ÷ its seconds, reading the prompt included."""
        return len(self.token_ids) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class StreamedToken:
    """A token as it is made."""

    index: int
    """Of the prompt."""
    text: str
    """What can be shown now: nothing while a character is incomplete or a stop string may be beginning."""
    exit_layer: int
    confidence: float
    is_last: bool


class EarlyExitLLM:
    """A model with exit heads, ready to decode."""

    def __init__(self, model: EarlyExitModel, stages: list[tuple[int, int]], tokenizer: Any, defaults: GenerationSection,
                 stop_token_ids: tuple[int, ...]):
        self.model, self.stages, self.tokenizer, self.defaults = model, stages, tokenizer, defaults
        self.stop_token_ids = stop_token_ids
        self.engine: Engine | None = None

    @classmethod
    def load(cls, model: str | Path, exits: str | Path | None = None, *, dtype: str | None = None,
             tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1) -> "EarlyExitLLM":
        """Reads a model and, where given, an exit-heads artifact bound to it. Raises InputError where they do not fit."""
        overrides = {"model.path": str(model), "exits.path": str(exits) if exits else None, "model.dtype": dtype,
                     "parallel.tensor_model_parallel_size": tensor_model_parallel_size,
                     "parallel.pipeline_model_parallel_size": pipeline_model_parallel_size}
        return cls.from_config(load_config(None, overrides))

    @classmethod
    def from_config(cls, config: Config, topology: Topology | None = None) -> "EarlyExitLLM":
        """As `load`, from a job's configuration; its `generation` section becomes the default of `generate`."""
        topology = topology or init_parallel(config.parallel)
        loaded = load_for_generation(config, topology)
        folder = model_folder(config.model.path)
        tokenizer = load_tokenizer(config.data.tokenizer or folder)
        stops = _stop_token_ids(folder, loaded.model.config.eos_token_ids)
        if not stops and tokenizer.eos_token_id is not None:  # a Megatron checkpoint does not say which token ends a text
            stops = (tokenizer.eos_token_id,)
        return cls(loaded.model, loaded.stages, tokenizer, config.generation, stops)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers that an exit head follows."""
        return self.model.plan.exit_layers

    @property
    def num_layers(self) -> int:
        """Layers of the backbone."""
        return self.model.config.num_layers

    def generate(self, prompts: list[str], **options: Any) -> list[Completion]:
        """Completes each prompt. `options` are keys of the `generation` section: policy, threshold, max_new_tokens, temperature, …

        Raises InputError on an option that can not be used, and on a prompt that is empty or longer than the context.
        """
        completions = [Completion(prompt=prompt) for prompt in prompts]
        for _ in self._run(completions, self._options(options)):
            pass
        return completions

    def stream(self, prompts: list[str], completions: list[Completion] | None = None, **options: Any) -> Iterator[StreamedToken]:
        """As `generate`, token by token; `completions`, if given, is filled with the finished records."""
        own = [Completion(prompt=prompt) for prompt in prompts]
        if completions is not None:
            completions.extend(own)
        yield from self._run(own, self._options(options))

    def _options(self, options: dict[str, Any]) -> GenerationSection:
        resolved = load_config(None, {f"generation.{key}": value for key, value in options.items()}).generation
        return dataclasses.replace(self.defaults, **{key: getattr(resolved, key) for key in options})

    def _run(self, completions: list[Completion], options: GenerationSection) -> Iterator[StreamedToken]:
        if not completions:
            return
        policy = policy_of(options, self.exit_layers, self.num_layers)
        prompts = [self._prompt_ids(c.prompt) for c in completions]
        check_sampling(options)
        engine = self._engine(prompts, options)
        sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
        started = time.perf_counter()
        running = {}
        for index, ids in enumerate(prompts):
            stream = TextStream(self._decode, ids, options.stop)
            sequence = engine.add(ids, sampling)
            running[id(sequence)] = _Running(index, sequence, completions[index], stream)
        try:
            while engine.running:
                yield from self._one_step(engine, policy, running, options, started)
        finally:
            for sequence in list(engine.running):  # the caller stopped listening
                engine.remove(sequence)

    def _one_step(self, engine: Engine, policy: Policy, running: dict[int, "_Running"], options: GenerationSection,
                  started: float) -> Iterator[StreamedToken]:
        for step in engine.step(policy):
            job = running[id(step.sequence)]
            shown = job.take(step, options, self.stop_token_ids, engine.cache.max_length)
            if job.completion.finish_reason:
                job.completion.seconds = time.perf_counter() - started
                engine.remove(step.sequence)
            yield StreamedToken(job.index, shown, step.exit_layer, step.confidence, bool(job.completion.finish_reason))

    def _prompt_ids(self, prompt: str) -> list[int]:
        try:
            ids = self.tokenizer(prompt)["input_ids"]
        except (TypeError, ValueError, UnicodeError) as error:
            raise InputError(f"a prompt must be UTF-8 text, got {prompt!r:.80}: {' '.join(str(error).split())}") from error
        if not ids and self.model.config.bos_token_id is not None:
            ids = [self.model.config.bos_token_id]
        limit = self.model.config.max_position_embeddings
        if not ids:
            raise InputError("a prompt must hold at least one token, got an empty one; this model has no beginning-of-text token")
        if len(ids) >= limit:
            raise InputError(f"a prompt must be shorter than the model's context of {limit} tokens, got {len(ids)}; shorten it")
        if max(ids) >= self.model.config.vocab_size:
            raise InputError(f"token ids must lie below the model's vocabulary of {self.model.config.vocab_size}, but its tokenizer gave "
                             f"{max(ids)}; use the tokenizer that the model was trained with")
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _engine(self, prompts: list[list[int]], options: GenerationSection) -> Engine:
        """An engine with room for these prompts; the last one where it has it."""
        longest = max(len(ids) for ids in prompts) + options.max_new_tokens
        wanted = min(longest, self.model.config.max_position_embeddings)
        engine = self.engine
        if (engine is None or engine.running or len(engine.cache.free) < len(prompts) or engine.cache.max_length < wanted
                or engine.max_pending != options.max_pending):
            self.engine = engine = None  # before the new caches are made
            self.engine = engine = Engine(self.model, self.stages, num_slots=len(prompts), max_length=wanted,
                                          max_pending=options.max_pending)
        return engine


@dataclass
class _Running:
    index: int
    sequence: Sequence
    completion: Completion
    stream: TextStream

    def take(self, step: TokenStep, options: GenerationSection, eos: tuple[int, ...], max_length: int) -> str:
        """Books a token; sets the finish reason where the completion ends. Returns the text to show."""
        done = self.completion
        done.token_ids.append(step.token_id)
        done.exit_layers.append(step.exit_layer)
        done.confidences.append(step.confidence)
        shown = ""
        if step.token_id in eos and not options.ignore_eos:
            done.finish_reason = "stop"
        else:
            shown = self.stream.push(step.token_id)
            if self.stream.has_stopped:
                done.finish_reason = "stop"
            elif len(done.token_ids) >= options.max_new_tokens or len(self.sequence.tokens) >= max_length:
                done.finish_reason = "length"
        if done.finish_reason:
            shown += self.stream.flush()
            done.text = self.stream.text
        return shown


def _stop_token_ids(folder: Path, from_config: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that end a completion: generation_config.json's where it names any, as transformers has it, else config.json's."""
    try:
        named = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError):  # models without one are many
        named = None
    return tuple(named) if isinstance(named, list) else from_config if named is None else (named,)


def check_sampling(options: GenerationSection) -> None:
    """Raises InputError on values no sampler can use."""
    rules = {"max_new_tokens": (options.max_new_tokens >= 1, "at least 1"), "temperature": (options.temperature >= 0, "at least 0"),
             "top_k": (options.top_k >= 0, "at least 0"), "top_p": (0 < options.top_p <= 1, "above 0 and at most 1"),
             "max_pending": (options.max_pending >= 1, "at least 1")}
    for name, (holds, rule) in rules.items():
        if not holds:
            raise InputError(f"generation.{name} must be {rule}, got {getattr(options, name)}")
    if "" in options.stop:
        raise InputError("a stop string must not be empty; leave --stop out to have none")


