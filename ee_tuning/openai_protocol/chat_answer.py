"""Answers of /v1/chat/completions."""

import secrets
from collections.abc import Mapping

from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.job import Job
from ee_tuning.openai_protocol.answer import Answer, Json, said
from ee_tuning.openai_protocol.schemas import ChatCompletionBody
from ee_tuning.openai_protocol.token_texts import TokenTexts
from ee_tuning.openai_protocol.tool_calls import ToolUse
from ee_tuning.openai_protocol.tool_formats import Delta, ToolCallReader


class ChatAnswer(Answer):
    """Messages of the assistant."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(
        self,
        body: ChatCompletionBody,
        jobs: list[Job],
        model_name: str,
        texts: TokenTexts,
        use: ToolUse | None,
        special: Mapping[int, str],
    ):
        """`use` describes the functions that may be called, if any; `special` are tokens that texts leave out."""
        super().__init__(body, jobs, model_name, texts)
        self._use = use
        self._marks = {token: text for token, text in special.items() if use is not None and text in use.form.marks}
        """Tokens that the text leaves out, and that mark calls."""
        self._readers = [ToolCallReader(use.form, use.names) for _ in range(self.n)] if use is not None else []
        self._messages: list[Json] = [{"content": ""} for _ in self._readers]

    def first_chunks(self) -> list[Json]:
        """Returns the chunks with the role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            self.as_chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(self.n)
        ]

    def take(self, place: int, token: StreamedToken) -> None:
        """Parses calls from the tokens of a whole answer: their marks may be tokens that the text leaves out."""
        if self._readers:
            message = self._messages[token.completion]
            for delta in self._deltas(token):
                if delta.call is None:
                    message["content"] += delta.text
                elif delta.name:
                    message.setdefault("tool_calls", []).append(_call(delta))
                else:
                    message["tool_calls"][delta.call]["function"]["arguments"] += delta.text

    def whole_choice(self, index: int, done: Completion) -> Json:
        """Returns the text of a choice, its calls and its log-probabilities."""
        logprobs, message = None, self._messages[index] if self._readers else Json(content=done.text)
        if done.logprobs:
            logprobs = {"content": list(map(self._logprob, done.token_ids, done.logprobs, done.top_logprobs))}
        if message.get("tool_calls"):
            message["content"] = message["content"] or None
        return {"message": {"role": "assistant", "refusal": None, **message}, "logprobs": logprobs}

    def token_choice(self, index: int, token: StreamedToken) -> Json:
        """Returns the text of one token, its part of calls and its log-probabilities."""
        logprobs = None
        if token.logprob is not None:
            logprobs = {"content": [self._logprob(token.token_id, token.logprob, token.top_logprobs or {})]}
        delta = _merged(self._deltas(token)) if self._readers else {"content": token.text} if token.text else {}
        return {"delta": delta, "logprobs": logprobs}

    def chunk(self, place: int, token: StreamedToken) -> Json | None:
        """Returns the chunk of a token; None where it is a part of a call's frame."""
        made = super().chunk(place, token)
        if made is None or not self._readers or self._tells_exits or self._tells_ids or token.logprob is not None:
            return made
        return made if made["choices"][0]["delta"] else None

    def finish_reason(self, index: int, completion: Completion) -> str:
        """Returns the reason; calls are one, unless the request names the function, as in OpenAI's API."""
        if completion.finish_reason == "stop" and self._use is not None and not self._use.is_named:
            return "tool_calls" if self._readers[index].num_calls else "stop"
        return completion.finish_reason

    def _deltas(self, token: StreamedToken) -> list[Delta]:
        reader = self._readers[token.completion]
        deltas = reader.push(token.text)
        deltas += reader.push(self._marks.get(token.token_id, ""))
        deltas += reader.finish() if token.is_last else []
        # If a call is required, any text is the beginning of a call that was cut off.
        return [delta for delta in deltas if delta.call is not None or self._use is None or not self._use.is_required]

    def end_choice(self) -> Json:
        """Returns the empty delta that ends a choice."""
        return {"delta": {}, "logprobs": None}

    def _logprob(self, token: int, logprob: float, top: dict[int, float]) -> Json:
        return {**self._told(token, logprob), "top_logprobs": [self._told(*each) for each in top.items()]}

    def _told(self, token: int, logprob: float) -> Json:
        as_bytes = self.texts.bytes_of(token)
        return {"token": self.texts.text(token), "logprob": said(logprob), "bytes": list(as_bytes)}


def _call(delta: Delta) -> Json:
    function = {"name": delta.name, "arguments": delta.text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _merged(deltas: list[Delta]) -> Json:
    """Returns the delta of a chunk."""
    content = "".join(delta.text for delta in deltas if delta.call is None)
    calls = [
        {"index": delta.call, **(_call(delta) if delta.name else {"function": {"arguments": delta.text}})}
        for delta in deltas
        if delta.call is not None
    ]
    return ({"content": content} if content else {}) | ({"tool_calls": calls} if calls else {})
