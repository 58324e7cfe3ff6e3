"""Answers of /v1/chat/completions."""

from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.serving.answer import Answer, Json, said


class ChatAnswer(Answer):
    """Messages of the assistant."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def first_chunks(self) -> list[Json]:
        """The role of each choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            self.as_chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(self.n)
        ]

    def whole_choice(self, index: int, done: Completion) -> Json:
        """The text of a choice and its log-probabilities."""
        logprobs = None
        if done.logprobs:
            logprobs = {"content": list(map(self._logprob, done.token_ids, done.logprobs, done.top_logprobs))}
        return {"message": {"role": "assistant", "content": done.text, "refusal": None}, "logprobs": logprobs}

    def token_choice(self, index: int, token: StreamedToken) -> Json:
        """The same of one token."""
        logprobs = None
        if token.logprob is not None:
            logprobs = {"content": [self._logprob(token.token_id, token.logprob, token.top_logprobs or {})]}
        return {"delta": {"content": token.text} if token.text else {}, "logprobs": logprobs}

    def end_choice(self) -> Json:
        """The same where nothing is left."""
        return {"delta": {}, "logprobs": None}

    def _logprob(self, token: int, logprob: float, top: dict[int, float]) -> Json:
        return {**self._told(token, logprob), "top_logprobs": [self._told(*each) for each in top.items()]}

    def _told(self, token: int, logprob: float) -> Json:
        as_bytes = self.texts.bytes_of(token)
        return {"token": self.texts.text(token), "logprob": said(logprob), "bytes": list(as_bytes)}
