"""Converts a request's body to the engine's jobs: parameters by their names here, prompts as token ids."""

import dataclasses
import secrets
from typing import Any

from ee_tuning.data.chat_template import ChatTemplate
from ee_tuning.data.messages import chat_messages
from ee_tuning.engine.engine import Engine
from ee_tuning.engine.requests import check_request
from ee_tuning.errors import InputError
from ee_tuning.generation.job import Job
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.options import params_of, with_options
from ee_tuning.openai_protocol.answer_form import answer_form, by_request_names
from ee_tuning.openai_protocol.schemas import ChatCompletionBody, CompletionBody, SamplingBody
from ee_tuning.openai_protocol.tool_calls import ToolUse, for_template, form_with_calls, tool_use
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL, Policy

COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions by default, as OpenAI has it; a chat may fill the context."""
MOST_LOGPROBS = 20
_BOTH_HEADS = ("contrast_layers", "contrast_alpha", "fuse_layer", "fuse_weight")
MOST_PROMPTS = 2048
_OWN = frozenset(
    {"tools", "documents", "chat_template", "tokenize", "padding", "truncation", "max_length", "tokenizer_kwargs"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "conversation", "messages"}
    | {"add_generation_prompt", "continue_final_message"}
)
"""Names that chat_template_kwargs must not have: they are arguments of the function that renders the template."""


class RequestJobs:
    """Makes jobs for one model and one engine."""

    def __init__(self, llm: EarlyExitLLM, engine: Engine, template: ChatTemplate, tool_call_parser: str | None = None):
        """`tool_call_parser` names the format of the model's tool calls. Raises InputError where these exits do not
        allow the job's own policy.
        """
        self.llm, self.template, self.tool_call_parser = llm, template, tool_call_parser
        self.engine = engine
        generation = llm.defaults
        if not llm.exit_layers and generation.policy == "threshold":  # the default of requests
            generation = dataclasses.replace(generation, policy="full")
        self.defaults = generation
        self.default_policy = llm.policy(generation)
        end = template.end_of_turn_id()
        self._end_of_turn = end if end is not None and end < llm.model.config.vocab_size else None

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.engine.cache.max_length

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be answered."""
        try:
            self.template.source()
        except InputError:
            return False
        return True

    def completion_jobs(self, body: CompletionBody) -> list[Job]:
        """Returns a job for each prompt. Raises InputError on values that can not be used."""
        prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]  # one prompt as token ids
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            raise InputError(f"prompt must hold 1..{MOST_PROMPTS} prompts, got {len(prompts)}; send several requests")
        logprobs = _bounded_logprobs("logprobs", body.logprobs)
        policy, adds = self._policy(body), body.add_special_tokens is not False
        jobs = []
        for prompt in prompts:
            text, ids = (prompt, ()) if isinstance(prompt, str) else ("", tuple(prompt))  # type: ignore[arg-type]
            if not text and not ids and isinstance(prompt, list):
                raise InputError("a prompt must hold at least one token, got an empty list; give text or token ids")
            limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
            limit = limit or int(bool(body.echo))  # 0 asks for an echo alone; room for one token is checked
            jobs.append(
                self._job(Job(text, self._params(body, limit, logprobs), policy, adds, ids, body.priority or 0))
            )
        return jobs

    def chat_job(self, body: ChatCompletionBody) -> Job:
        """Returns the job of a chat. Raises InputError on values that can not be used."""
        if body.max_completion_tokens is not None and body.max_tokens not in (None, body.max_completion_tokens):
            raise InputError(
                f"max_tokens is the older name of max_completion_tokens, got {body.max_tokens} and "
                f"{body.max_completion_tokens}; give one of them"
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise InputError(f"top_logprobs needs logprobs true, got {body.top_logprobs} without it; set logprobs, too")
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        logprobs = _bounded_logprobs("top_logprobs", body.top_logprobs or 0) if body.logprobs else None
        use = self.tool_use(body)
        text = self.chat_prompt(
            body.messages,
            adds_generation_prompt=body.add_generation_prompt,
            continues=bool(body.continue_final_message),
            variables=body.chat_template_kwargs,
            tools=[] if body.tool_choice == "none" else body.tools,
        )
        params = self._params(body, self.max_model_len if limit is None else limit, logprobs)
        form = form_with_calls(use, params.structured_output, self.llm.special)
        params = dataclasses.replace(params, structured_output=form)
        if self._end_of_turn is not None and not params.ignore_eos:
            ids = tuple(dict.fromkeys((*params.stop_token_ids, self._end_of_turn)))
            params = dataclasses.replace(params, stop_token_ids=ids)
        try:
            return self._job(
                Job(text, params, self._policy(body), adds_special_tokens=False, priority=body.priority or 0)
            )
        except InputError as error:
            raise InputError(
                by_request_names(str(error), is_call=use is not None, has_format=body.response_format is not None)
            ) from error

    def tool_use(self, body: ChatCompletionBody) -> ToolUse | None:
        """Returns the tool use of a chat. Raises InputError on values that can not be used."""
        return tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, self.tool_call_parser)

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        *,
        adds_generation_prompt: bool | None,
        continues: bool,
        variables: dict[str, Any] | None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """Returns the text of a chat. Raises InputError where the template refuses it."""
        if not messages:
            raise InputError("messages must hold at least one message, got none; give one of role user")
        if continues and adds_generation_prompt:
            raise InputError(
                "continue_final_message needs add_generation_prompt false, got true; a new answer can not begin within one"
            )
        if taken := _OWN & set(variables or {}):
            raise InputError(f"chat_template_kwargs must be variables of the template, got {min(taken)}; leave it out")
        return self.template.render(
            for_template(chat_messages(messages, "messages", lambda: "the request")),
            tools or None,
            add_generation_prompt=not continues if adds_generation_prompt is None else adds_generation_prompt,
            continue_final_message=continues,
            **(variables or {}),
        )

    def _job(self, job: Job) -> Job:
        """Returns `job` with its token ids. Raises InputError where the engine would refuse it."""
        job = self.llm.prepared(job)
        engine = self.engine
        model = self.llm.model
        check_request(list(job.prompt_ids), job.params, job.policy, model.config, model.plan, engine.cache)
        return job

    def _params(self, body: SamplingBody, max_tokens: int, logprobs: int | None) -> SamplingParams:
        own: dict[str, Any] = {
            name: value
            for name in ("n", "temperature", "top_p", "min_p", "ignore_eos", "min_tokens")
            if (value := getattr(body, name)) is not None
        }
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            if (value := getattr(body, name)) is not None:
                own[name] = value
        if body.top_k is not None:
            own["top_k"] = max(body.top_k, 0) if body.top_k >= -1 else body.top_k
        if body.stop is not None:
            own["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        if body.stop_token_ids is not None:
            own["stop_token_ids"] = tuple(body.stop_token_ids)
        if body.logit_bias is not None:
            own["logit_bias"] = _biases(body.logit_bias)
        own["structured_output"] = answer_form(body.response_format, body.structured_outputs)
        seed = secrets.randbits(62) if body.seed is None else body.seed
        both_heads = {name: value for name in _BOTH_HEADS if (value := getattr(body, name)) is not None}
        defaults = with_options(self.defaults, both_heads) if both_heads else self.defaults
        return dataclasses.replace(params_of(defaults), max_tokens=max_tokens, logprobs=logprobs, seed=seed, **own)

    def _policy(self, body: SamplingBody) -> Policy:
        given: dict[str, Any] = {
            key: value
            for key, value in (
                ("policy", body.policy),
                ("exit_layer", body.exit_layer),
                ("measure", body.exit_measure),
                ("threshold", body.exit_threshold),
            )
            if value is not None
        }
        if not given:
            return self.default_policy
        if given.get("policy") == "full":
            return FULL
        if isinstance(given.get("threshold"), float | int):
            given["threshold"] = [given["threshold"]]
        if "policy" not in given:  # the other keys determine it
            given["policy"] = "fixed" if "exit_layer" in given else "threshold"
        try:
            return self.llm.policy(with_options(self.defaults, given))
        except InputError as error:
            raise InputError(_by_api_names(str(error))) from error


def _by_api_names(message: str) -> str:
    """Replaces flags and keys in a message by the names that a request has for them."""
    for flag, name in (
        ("--exit-layer", "exit_layer"),
        ("--threshold", "exit_threshold"),
        ("; give --exits FOLDER, or --policy full", "; this server has none: ask for policy full"),
        ("none, give --exits", "none"),
    ):
        message = message.replace(flag, name)
    return message


def _bounded_logprobs(name: str, value: int | None) -> int | None:
    if value is not None and not 0 <= value <= MOST_LOGPROBS:
        raise InputError(f"{name} must lie in 0..{MOST_LOGPROBS}, got {value}")
    return value


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in given.items() if token.isdecimal() or int(token)}
    except ValueError as error:
        raise InputError(f"logit_bias must have token ids as its keys, got {error}") from error
