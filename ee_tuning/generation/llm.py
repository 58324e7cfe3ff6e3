"""Text in, text out: the Python interface of the decoder.

    from ee_tuning import EarlyExitLLM, SamplingParams
    llm = EarlyExitLLM.load("path/to/model", "path/to/exit_heads")
    print(llm.generate(["def main():"], SamplingParams(max_tokens=50), threshold=0.8)[0].text)

Under torchrun every rank makes the same calls with the same arguments, and every rank gets the same answers.
"""

import dataclasses
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.checkpoint.formats import model_folder
from ee_tuning.config import Config, GenerationSection, load_config
from ee_tuning.config.generation import without_overruled
from ee_tuning.data.tokenizer import beginning_ids, begun, load_tokenizer, tokenizer_of
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.grammar import Grammars
from ee_tuning.engine.params import SamplingParams
from ee_tuning.engine.policy import Policy, policy_of
from ee_tuning.engine.speculation_memory import speculation_memory
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.completion_runner import CompletionRunner
from ee_tuning.generation.job import Job
from ee_tuning.generation.scoring import Score, TokenPair, score, token_pairs
from ee_tuning.generation.text import special_tokens
from ee_tuning.model.config import ModelConfig
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model.token_ids import generation_end_token_ids
from ee_tuning.parallel.topology import Topology, init_parallel

__all__ = ["Completion", "EarlyExitLLM", "Job", "StreamedToken"]


class EarlyExitLLM:
    """A model with exit heads, ready to decode."""

    def __init__(
        self,
        model: EarlyExitModel,
        stages: list[tuple[int, int]],
        tokenizer: Any,
        defaults: GenerationSection,
        stop_token_ids: tuple[int, ...],
        heads_digest: str | None = None,
    ):
        """`heads_digest` tells a calibration made for these exit heads from others; see LoadedModel."""
        self.model, self.stages, self.tokenizer, self.defaults = model, stages, tokenizer, defaults
        self.stop_token_ids, self.heads_digest = stop_token_ids, heads_digest
        self.grammars = Grammars(tokenizer, model.config.vocab_size, stop_token_ids)
        self.engine: Engine | None = None
        self.special = {
            token: text for token, text in special_tokens(tokenizer).items() if token < model.config.vocab_size
        }
        """Token id -> text of each special token."""
        self._beginning = beginning_ids(tokenizer)
        self._settings: dict[str, Any] = {}

    @classmethod
    def load(
        cls,
        model: str | Path,
        exits: str | Path | None = None,
        *,
        dtype: str | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        trust_remote_code: bool = False,
    ) -> "EarlyExitLLM":
        """Reads a model and, where given, an exit-heads artifact bound to it. With `trust_remote_code`, Python files of
        the tokenizer's folder run where it needs them. Raises InputError where they do not fit.
        """
        overrides = {
            "model.path": str(model),
            "exits.path": str(exits) if exits else None,
            "model.dtype": dtype,
            "model.trust_remote_code": trust_remote_code,
            "parallel.tensor_model_parallel_size": tensor_model_parallel_size,
            "parallel.pipeline_model_parallel_size": pipeline_model_parallel_size,
        }
        return cls.from_config(load_config(None, overrides))

    @classmethod
    def from_config(cls, config: Config, topology: Topology | None = None) -> "EarlyExitLLM":
        """Loads what a job's configuration names; its `generation` section becomes the default of `generate`."""
        topology = topology or init_parallel(config.parallel)
        loaded = load_for_generation(config, topology)
        folder = model_folder(config.model.path)
        tokenizer = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
        return cls(
            loaded.model,
            loaded.stages,
            tokenizer,
            config.generation,
            _stop_token_ids(folder, loaded.model.config, tokenizer),
            loaded.heads_digest,
        )

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers that an exit head follows."""
        return self.model.plan.exit_layers

    @property
    def num_layers(self) -> int:
        """Layers of the backbone."""
        return self.model.config.num_layers

    def generate(
        self,
        prompts: str | Iterable[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Completes each prompt, or the one, `n` times where asked. `options` are keys of the `generation` section:
        policy, threshold, …

        `params`, one for all prompts or one for each, replaces the section's keys of sampling; `policy` may be a list,
        too, of `Policy`s. Raises InputError, before anything is decoded, on an option that can not be used and on a
        prompt that is empty or too long.
        """
        completions: list[Completion] = []
        resolved, jobs = self._jobs_of(prompts, params, **options)
        for _ in self.run(jobs, completions, resolved, shows_text=False):
            pass
        return completions

    def stream(
        self,
        prompts: str | Iterable[str],
        completions: list[Completion] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> Generator[StreamedToken, None, None]:
        """Does what `generate` does, token by token; `completions`, if given, is filled with the finished records.

        A prompt that a chat template made has its special tokens already: not `adds_special_tokens`.
        """
        own: list[Completion] = [] if completions is None else completions
        resolved, jobs = self._jobs_of(prompts, params, **options)
        yield from self.run(jobs, own, resolved)

    def score(self, pairs: Iterable[tuple[str, str] | TokenPair], **options: Any) -> list[Score]:
        """Log-probabilities of each pair's continuation after its context, both texts or both token ids; see
        `scoring.py`.

        `options` as `generate`'s. A context is cut from the left to what the model has positions for. Raises InputError
        on pairs and options that can not be used, and while completions are streamed.
        """
        given = options.pop("policy") if isinstance(options.get("policy"), Policy) else None
        resolved = self._options(options)
        if self.engine is not None and not self.engine.is_idle:
            raise InputError(
                "score must wait until all completions of a stream are there; read it to its end, or close it"
            )
        return score(
            self.model,
            token_pairs(self.model, self.token_ids, pairs),
            given or self.policy(resolved),
            resolved.max_batch_size,
        )

    def _jobs_of(
        self,
        prompts: str | Iterable[str],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        adds_special_tokens: bool = True,
        **options: Any,
    ) -> tuple[GenerationSection, list[Job]]:
        resolved, jobs = self.jobs(prompts, params, **options)
        return resolved, [dataclasses.replace(job, adds_special_tokens=adds_special_tokens) for job in jobs]

    def jobs(
        self,
        prompts: str | Iterable[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> tuple[GenerationSection, list[Job]]:
        """The `generation` section that `options` make, and what is to be done. `structured_output` is an option,
        too.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        form = options.pop("structured_output", None)
        given = options.get("policy")
        if not isinstance(given, str | None):
            del options["policy"]
        resolved = self._options(options)
        if given is None or isinstance(given, str):
            given = self.policy(resolved)
        policies = list(given) if isinstance(given, Sequence) else [given] * len(prompts)
        listed = list(params) if isinstance(params, Sequence) else [params or params_of(resolved)] * len(prompts)
        if form is not None:
            listed = [dataclasses.replace(each, structured_output=form) for each in listed]
        for name, values in (("params", listed), ("policy", policies)):
            if len(values) != len(prompts):
                raise InputError(
                    f"{name} must be one for all prompts or one for each of the {len(prompts)}, got {len(values)}"
                )
        return resolved, [Job(*job) for job in zip(prompts, listed, policies, strict=True)]

    def policy(self, options: GenerationSection) -> Policy:
        """What the section's keys ask of these exits. Raises InputError where it is not to be had."""
        return policy_of(
            options,
            self.exit_layers,
            self.num_layers,
            self.heads_digest,
            has_draft_head=bool(self.model.plan.aux_layers),
        )

    def run(
        self,
        jobs: list[Job],
        completions: list[Completion],
        options: GenerationSection,
        *,
        keeps_errors: bool = False,
        shows_text: bool = True,
    ) -> Generator[StreamedToken, None, None]:
        """Decodes `jobs`, appends a record for each completion to `completions`, and yields tokens as they come.

        With `keeps_errors` a job that can not be done gets a record with its `error`, and the others go on. Without
        `shows_text` tokens come without their text, which is made once, for the record.
        """
        if not jobs:
            return
        prepared = [self._prepared_or_error(job, keeps_errors) for job in jobs]
        engine = self._engine([job for job in prepared if isinstance(job, Job)], options)
        runner = CompletionRunner(engine, self.decode, self.special, keeps_errors=keeps_errors)
        started = time.perf_counter()
        try:
            for index, job in enumerate(prepared):
                try:
                    if isinstance(job, InputError):
                        raise job
                    completions += runner.add(job, index, started=started, shows_text=shows_text)
                except InputError as error:
                    if not keeps_errors:
                        raise
                    completions.append(
                        Completion(
                            prompt=jobs[index].prompt, prompt_index=index, finish_reason="error", error=str(error)
                        )
                    )
            while not runner.is_idle:
                yield from runner.step()
        finally:
            runner.clear()  # the caller may have stopped listening
            engine.proposer.keep()

    def _options(self, options: dict[str, Any]) -> GenerationSection:
        resolved = with_options(self.defaults, options)
        for name in ("max_pending", "prefill_chunk", "max_batch_size"):
            if getattr(resolved, name) < 1:
                raise InputError(f"generation.{name} must be at least 1, got {getattr(resolved, name)}")
        if resolved.cache_tokens is not None and resolved.cache_tokens < 1:
            raise InputError(f"generation.cache_tokens must be at least 1, got {resolved.cache_tokens}")
        return resolved

    def prepared(self, job: Job) -> Job:
        """`job` with its token ids, and in which a stop string that is a special token is that token's id, too.

        Raises InputError on values that no sampler can use, on a form that is none, and on a prompt that is empty or
        too long.
        """
        job.params.check(self.model.config.vocab_size)
        if job.params.structured_output is not None:
            self.grammars.compile(job.params.structured_output)
        return dataclasses.replace(
            job,
            params=self._with_stop_tokens(job.params),
            prompt_ids=job.prompt_ids or tuple(self.encode(job.prompt, job.adds_special_tokens)),
        )

    def _prepared_or_error(self, job: Job, keeps_errors: bool) -> Job | InputError:
        try:
            return self.prepared(job)
        except InputError as error:
            if not keeps_errors:
                raise
            return error

    def _with_stop_tokens(self, params: SamplingParams) -> SamplingParams:
        named = tuple(token for token, text in self.special.items() if text in params.stop)
        return (
            dataclasses.replace(params, stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *named))))
            if named
            else params
        )

    def encode(self, prompt: str, adds_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, which the tokenizer begins and does not end; the beginning-of-text token for an empty
        one.

        Raises InputError where there are none, or too many.
        """
        ids, limit = self.token_ids(prompt, adds_special_tokens), self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise InputError(
                f"a prompt must be shorter than the model's context of {limit} tokens, got {len(ids)}; shorten it"
            )
        return ids

    def token_ids(self, prompt: str, adds_special_tokens: bool = True) -> list[int]:
        """Token ids of a text of any length. Raises InputError where there are none."""
        try:
            ids = begun(
                self.tokenizer(prompt, add_special_tokens=False)["input_ids"],
                self._beginning if adds_special_tokens else [],
            )
        except (TypeError, ValueError, UnicodeError) as error:
            raise InputError(
                f"a prompt must be UTF-8 text, got {prompt!r:.80}: {' '.join(str(error).split())}"
            ) from error
        if not ids and self.model.config.bos_token_id is not None:
            ids = [self.model.config.bos_token_id]
        if not ids:
            raise InputError(
                "a prompt must hold at least one token, got an empty one; this model has no beginning-of-text token"
            )
        if max(ids) >= self.model.config.vocab_size:
            raise InputError(
                f"token ids must lie below the model's vocabulary of {self.model.config.vocab_size}, but its tokenizer gave "
                f"{max(ids)}; use the tokenizer that the model was trained with"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _engine(self, jobs: list[Job], options: GenerationSection) -> Engine:
        """An engine with room for these jobs; the last one where it has it."""
        limit = self.model.config.max_position_embeddings
        longest = min(max((len(job.prompt_ids) + job.params.max_tokens for job in jobs), default=limit), limit)
        rows = max(1, min(sum(job.params.n for job in jobs), options.max_batch_size))
        engine = self.engine
        if (
            engine is None
            or not engine.is_idle
            or engine.num_slots < rows
            or engine.cache.max_length < longest
            or self._settings != engine_settings(options)
        ):
            if (
                engine is not None and engine.cache.max_length < longest
            ):  # a conversation: not a new engine, which knows nothing, each turn
                longest = min(2 * longest, limit)
            engine = None  # before the new caches are made
            engine = self.new_engine(options, num_slots=rows, max_length=longest)
        return engine

    def new_engine(self, options: GenerationSection, *, num_slots: int, max_length: int) -> Engine:
        """Replaces the engine by one for `num_slots` sequences of up to `max_length` tokens. Raises InputError where
        the model has fewer positions.
        """
        # What costs and is right at which exit stays as it was.
        known = (self.engine.proposer.speculation, self.engine.proposer.memory) if self.engine is not None else None
        self.engine = None  # before the new caches are made
        self._settings = engine_settings(options)
        self.engine = engine = Engine(
            self.model,
            self.stages,
            num_slots=num_slots,
            max_length=max_length,
            eos_ids=self.stop_token_ids,
            grammars=self.grammars,
            **self._settings,
        )
        engine.proposer.speculation, engine.proposer.memory = known or (
            None,
            speculation_memory(engine.stage, self.heads_digest),
        )
        return engine


def engine_settings(options: GenerationSection) -> dict[str, Any]:
    """The keys of the section that an engine is made by."""
    return {
        "max_pending": options.max_pending,
        "prefill_chunk": options.prefill_chunk,
        "cache_tokens": options.cache_tokens,
        "reuses_prefixes": options.reuse_prefixes,
    }


def with_options(defaults: GenerationSection, options: dict[str, Any]) -> GenerationSection:
    """`defaults`, but for the keys in `options`. A threshold or measure of its own overrules a calibration file among
    the defaults.
    """
    given = load_config(None, {f"generation.{key}": value for key, value in options.items()}).generation
    kept = without_overruled(vars(defaults), options)
    return GenerationSection(**{**kept, **{key: getattr(given, key) for key in options}})


def params_of(generation: GenerationSection) -> SamplingParams:
    """The section's keys of sampling. Values are looked at when a request is added."""
    same = {field.name for field in dataclasses.fields(SamplingParams)} & {
        field.name for field in dataclasses.fields(GenerationSection)
    }
    return SamplingParams(
        max_tokens=generation.max_new_tokens,
        min_tokens=generation.min_new_tokens,
        **{name: getattr(generation, name) for name in same},
    )


def _stop_token_ids(folder: Path, config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion: generation_config.json's where it names any, as transformers has it, else
    config.json's.

    A Megatron checkpoint names none: then the tokenizer's end of text.
    """
    named = generation_end_token_ids(folder, config.vocab_size)
    if named is not None or config.eos_token_ids:
        return config.eos_token_ids if named is None else named
    token = getattr(tokenizer, "eos_token_id", None)
    return (token,) if isinstance(token, int) and 0 <= token < config.vocab_size else ()
