"""The bodies of requests. Unknown parameters and wrong types are refused; the OpenAPI is made from here."""

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ee_tuning.config.generation import Measure

IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""Parameters of OpenAI's API that change nothing here."""
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((None,), "this server answers in text; leave it out"),
    "best_of": ((None, 1), "ask for n completions and choose among them"),
    "function_call": ((None, "none"), "give tool_choice, its newer form"),
    "functions": ((None, []), "give tools, their newer form"),
    "guided_choice": ((None,), 'give structured_outputs {"choice": …}'),
    "guided_grammar": ((None,), 'give structured_outputs {"grammar": …}'),
    "guided_json": ((None,), 'give structured_outputs {"json": …}'),
    "guided_regex": ((None,), 'give structured_outputs {"regex": …}'),
    "include_stop_str_in_output": ((None, False), "stop strings are left out of the text; append it yourself"),
    "modalities": ((None, ["text"]), "this server answers in text; leave it out"),
    "prompt_logprobs": ((None,), "ask /v1/completions for echo and logprobs"),
    "reasoning_effort": ((None,), "give what the chat template takes in chat_template_kwargs"),
    "skip_special_tokens": ((None, True), "special tokens are left out of the text; ask for return_token_ids"),
    "suffix": ((None, ""), "texts are continued, not filled in; leave it out"),
    "tool_choice": ((None, "none"), "tools are for chats; ask /v1/chat/completions"),
    "tools": ((None, []), "tools are for chats; ask /v1/chat/completions"),
}
"""Parameters that are refused, except with these values, which request nothing."""

Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenIds = list[Whole]


def _between(least: float, most: float | None = None) -> Any:
    """Returns a range for the OpenAPI document; the engine refuses other values, with its own message."""
    return {"minimum": least} if most is None else {"minimum": least, "maximum": most}


class Body(BaseModel):
    """Base of all bodies: unknown and unsupported parameters are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        known, kept = cls.model_fields, {}
        for name, value in tree.items():
            if name in known:
                kept[name] = value
            elif name in UNSUPPORTED:
                neutral, remedy = UNSUPPORTED[name]
                if not any(type(value) is type(each) and value == each for each in neutral):
                    raise _refusal(name, f"{name} is not supported: {remedy}")
            elif name not in IGNORED:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
                hint = f"did you mean {near[0]}?" if near else "leave it out; /docs lists what there is"
                raise _refusal(name, f"unknown parameter {name[:60]!r}; {hint}")
        return kept


def _refusal(name: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message, "param": name[:60]})


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    """Whether a last chunk counts the tokens."""
    continuous_usage_stats: bool | None = Field(
        default=None, description="whether every chunk counts the tokens so far; with include_usage, as in vLLM"
    )
    include_obfuscation: bool | None = Field(default=None, description="accepted; streams are never padded")


class SamplingBody(Body):
    """Parameters of both kinds of completions."""

    model: str | None = Field(default=None, description="one of /v1/models; the server's model by default")
    n: Whole | None = Field(
        default=None, description="completions of each prompt (default 1)", json_schema_extra=_between(1, 1024)
    )
    temperature: float | None = Field(default=None, description="0 is greedy", json_schema_extra=_between(0, 100))
    top_p: float | None = Field(default=None, json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})
    top_k: Whole | None = Field(default=None, description="0 or -1 for all", json_schema_extra=_between(-1))
    min_p: float | None = Field(default=None, json_schema_extra=_between(0, 1))
    repetition_penalty: float | None = Field(default=None, json_schema_extra=_between(0.01, 100))
    presence_penalty: float | None = Field(default=None, json_schema_extra=_between(-100, 100))
    frequency_penalty: float | None = Field(default=None, json_schema_extra=_between(-100, 100))
    logit_bias: dict[str, float] | None = Field(default=None, description="token id: what is added to its logit")
    seed: Whole | None = Field(default=None, description="the same seed gives the same tokens; drawn by default")
    max_tokens: Whole | None = Field(default=None, json_schema_extra=_between(0))
    min_tokens: Whole | None = Field(default=None, json_schema_extra=_between(0))
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    priority: Whole | None = Field(
        default=None, description="of requests that wait, lower ones begin first (default 0)"
    )
    response_format: dict[str, Any] | None = Field(
        default=None, description="the answer's form: type text, json_object, or json_schema with its schema"
    )
    structured_outputs: dict[str, Any] | None = Field(
        default=None, description="the answer's form, as vLLM has it: one of json, json_object, regex, choice, grammar"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    policy: Literal["full", "threshold", "fixed", "speculative"] | None = Field(
        default=None, description="when tokens leave the network; the server's own by default (/v1/exits)"
    )
    exit_threshold: float | list[float] | None = Field(
        default=None, description="confidence from which a token leaves: one for all exits, or one for each"
    )
    exit_layer: Whole | None = Field(default=None, description="the exit of the policy fixed")
    exit_measure: Measure | None = Field(default=None, description="measure of confidence")
    contrast_layers: TokenIds | None = Field(
        default=None, description="exits that the final head's logits are contrasted with (DoLa)"
    )
    contrast_alpha: float | None = Field(
        default=None,
        description="share of the likeliest token's probability below which contrast chooses none (default 0.1)",
        json_schema_extra=_between(0, 1),
    )
    fuse_layer: Whole | None = Field(
        default=None, description="the exit whose log-probabilities are mixed with the final head's"
    )
    fuse_weight: float | None = Field(
        default=None, description="the weight of that exit (default 0.5)", json_schema_extra=_between(0, 1)
    )
    return_exit_layers: bool | None = Field(
        default=None, description="whether choices tell the layer that each token left at, and its confidence"
    )
    return_token_ids: bool | None = Field(default=None, description="whether choices hold token ids")


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds] = Field(
        description="text, token ids, or a list of either; token ids are taken as they are"
    )
    echo: bool | None = Field(
        default=None,
        description="whether the text begins with the prompt, and logprobs with those of the prompt; max_tokens may be 0",
    )
    logprobs: Whole | None = Field(
        default=None, description="likeliest tokens told at each place, at most 20", json_schema_extra=_between(0, 20)
    )
    add_special_tokens: bool | None = Field(
        default=None, description="whether a text begins as the tokenizer begins texts (default true)"
    )


class ChatCompletionBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Whole | None = Field(
        default=None, description="the newer name of max_tokens", json_schema_extra=_between(1)
    )
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(
        default=None, description="likeliest tokens told at each place, at most 20", json_schema_extra=_between(0, 20)
    )
    tools: list[dict[str, Any]] | None = Field(default=None, description="functions that the answer may call")
    tool_choice: str | dict[str, Any] | None = Field(
        default=None, description="none, auto (the default with tools), required, or the function to call"
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="whether an answer may have several calls (default true)"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="variables of the chat template")
    add_generation_prompt: bool | None = Field(default=None, description="whether an answer is begun (default true)")
    continue_final_message: bool | None = Field(
        default=None, description="whether the last message is continued; needs add_generation_prompt false"
    )


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
