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
from ee_tuning.data.tokenizer import beginning_ids, begun, load_tokenizer, tokenizer_of
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.speculation_memory import speculation_memory
from ee_tuning.errors import InputError
from ee_tuning.generation.budget_exit import BudgetExit
from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.completion_runner import CompletionRunner
from ee_tuning.generation.depth_budget import with_exit_within_budget
from ee_tuning.generation.job import Job
from ee_tuning.generation.options import check_sizes, checked_options, engine_settings, params_of
from ee_tuning.generation.scoring import Score, TokenPair, score, token_pairs
from ee_tuning.generation.text import special_tokens
from ee_tuning.model.early_exit import EarlyExitModel
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.model_config.token_ids import generation_end_token_ids
from ee_tuning.parallel.time_parts import count_step
from ee_tuning.parallel.topology import Topology, init_parallel
from ee_tuning.sampling.exit_fusion import ExitFusion
from ee_tuning.sampling.grammar import Grammars
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy, policy_of

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
        budget_exit: BudgetExit | None = None,
    ):
        """`heads_digest` identifies these exit heads, so that calibrations made for others are refused; see
        LoadedModel. `budget_exit` is the choice of generation.budget, which `defaults` have as their exit.
        """
        self.model, self.stages, self.tokenizer, self.defaults = model, stages, tokenizer, defaults
        self.stop_token_ids, self.heads_digest, self.budget_exit = stop_token_ids, heads_digest, budget_exit
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
        adapter: str | Path | None = None,
        dtype: str | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        trust_remote_code: bool = False,
    ) -> "EarlyExitLLM":
        """Reads a model, with the trained weights of `adapter` over it (model.adapter), and, where given, an exit-heads
        artifact bound to it. With `trust_remote_code`, Python files of
        the tokenizer's folder run where it needs them. Raises InputError where they do not fit.
        """
        overrides = {
            "model.path": str(model),
            "exits.path": str(exits) if exits else None,
            "model.adapter": str(adapter) if adapter else None,
            "model.dtype": dtype,
            "model.trust_remote_code": trust_remote_code,
            "parallel.tensor_model_parallel_size": tensor_model_parallel_size,
            "parallel.pipeline_model_parallel_size": pipeline_model_parallel_size,
        }
        return cls.from_config(load_config(None, overrides))

    @classmethod
    def from_config(
        cls, config: Config, topology: Topology | None = None, budget_exit: BudgetExit | None = None
    ) -> "EarlyExitLLM":
        """Loads what a job's configuration names; its `generation` section becomes the default of `generate`, with the
        exit that generation.budget chooses, or chose before: `budget_exit`. Raises InputError where they do not fit, or
        no exit meets the budget.
        """
        check_sizes(config.generation)
        topology = topology or init_parallel(config.parallel)
        loaded = load_for_generation(config, topology)
        folder = model_folder(config.model.path)
        tokenizer = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
        defaults, budget_exit = with_exit_within_budget(loaded.model, loaded.stages, config.generation, budget_exit)
        return cls(
            loaded.model,
            loaded.stages,
            tokenizer,
            defaults,
            _stop_token_ids(folder, loaded.model.config, tokenizer),
            loaded.heads_digest,
            budget_exit,
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
        """Completes each prompt, or the single one, `n` times. `options` are keys of the `generation` section: policy,
        threshold, …

        `params`, one for all prompts or one for each, replaces the section's keys of sampling; `policy` may be a list,
        too, of `Policy`s. Raises InputError, before anything is decoded, on an option that can not be used and on a
        prompt that is empty or too long.
        """
        completions: list[Completion] = []
        resolved, jobs = self.jobs(prompts, params, **options)
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
        """Does the work of `generate`, token by token. `completions`, if given, is filled with the finished records. A
        prompt that a chat template made has its special tokens already: set `adds_special_tokens` to False for it.
        """
        own: list[Completion] = [] if completions is None else completions
        resolved, jobs = self.jobs(prompts, params, **options)
        yield from self.run(jobs, own, resolved)

    def score(self, pairs: Iterable[tuple[str, str] | TokenPair], **options: Any) -> list[Score]:
        """Returns the log-probabilities of each pair's continuation after its context, both texts or both token ids;
        see `scoring.py`.

        `options` are as in `generate`. A context is cut from the left to the model's number of positions. Raises
        InputError on pairs and options that can not be used, and while completions are streamed.
        """
        given = options.pop("policy") if isinstance(options.get("policy"), Policy) else None
        resolved = checked_options(self.defaults, options)
        if ExitFusion.of(resolved).layers:
            raise InputError(
                "score reads given texts by one head each, and contrast_layers and fuse_layer ask for two; leave them out"
            )
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

    def jobs(
        self,
        prompts: str | Iterable[str],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adds_special_tokens: bool = True,
        **options: Any,
    ) -> tuple[GenerationSection, list[Job]]:
        """Returns the `generation` section that `options` describe, and the jobs of the prompts. `structured_output` is
        an option, too.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        form = options.pop("structured_output", None)
        given = options.get("policy")
        if not isinstance(given, str | None):
            del options["policy"]
        resolved = checked_options(self.defaults, options)
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
        jobs = zip(prompts, listed, policies, strict=True)
        return resolved, [Job(*job, adds_special_tokens=adds_special_tokens) for job in jobs]

    def policy(self, options: GenerationSection) -> Policy:
        """Returns the policy that the section's keys describe. Raises InputError where these exits do not allow it."""
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

        With `keeps_errors` a job that fails gets a record with its `error`, and the others continue. Without
        `shows_text` tokens have no text, and each completion is decoded once, at its end.
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
                count_step()
        finally:
            runner.clear()  # the caller may have stopped listening
            engine.proposer.keep()

    def prepared(self, job: Job) -> Job:
        """Returns `job` with its token ids. A stop string that is a special token also becomes a stop token.

        Raises InputError on unusable sampling parameters, an invalid structured output, and a prompt that is empty or
        too long.
        """
        job.params.check(self.model.config.vocab_size)
        job.params.fusion.check(self.model.plan.exits, job.policy)
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
        """Returns the token ids of a prompt, with the tokenizer's beginning tokens and without its end. An empty prompt
        is the beginning-of-text token.

        Raises InputError where there are none, or too many.
        """
        ids, limit = self.token_ids(prompt, adds_special_tokens), self.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise InputError(
                f"a prompt must be shorter than the model's context of {limit} tokens, got {len(ids)}; shorten it"
            )
        return ids

    def token_ids(self, prompt: str, adds_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text of any length. Raises InputError where there are none."""
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
        """Returns the text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _engine(self, jobs: list[Job], options: GenerationSection) -> Engine:
        """Returns an engine with room for these jobs: the current one if it has room, or a new one."""
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
            # Otherwise each turn of a conversation would need a new engine, with an empty cache.
            if engine is not None and engine.cache.max_length < longest:
                longest = min(2 * longest, limit)
            engine = None  # before the new caches are made
            engine = self.new_engine(options, num_slots=rows, max_length=longest)
        return engine

    def new_engine(self, options: GenerationSection, *, num_slots: int, max_length: int) -> Engine:
        """Replaces the engine by one for `num_slots` sequences of up to `max_length` tokens. Raises InputError where
        the model has fewer positions.
        """
        # Measured costs and acceptance rates of the exits are kept.
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


def _stop_token_ids(folder: Path, config: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end a completion: those of generation_config.json, if it names any, or of config.json, as
    in transformers.

    A Megatron checkpoint names none; the tokenizer's end of text is used.
    """
    named = generation_end_token_ids(folder, config.vocab_size)
    if named is not None or config.eos_token_ids:
        return config.eos_token_ids if named is None else named
    token = getattr(tokenizer, "eos_token_id", None)
    return (token,) if isinstance(token, int) and 0 <= token < config.vocab_size else ()
