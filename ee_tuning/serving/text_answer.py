"""Answers of /v1/completions."""

from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.job import Job
from ee_tuning.serving.answer import Answer, Json, said
from ee_tuning.serving.schemas import CompletionBody
from ee_tuning.serving.token_texts import TokenTexts


class TextAnswer(Answer):
    """Texts."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, body: CompletionBody, jobs: list[Job], model_name: str, texts: TokenTexts, prompts: list[str]):
        """`prompts` are the texts that an echo repeats."""
        super().__init__(body, jobs, model_name, texts)
        self._prompts = prompts if body.echo else [""] * len(jobs)
        self._offsets: dict[int, int] = {}
        """Choice -> characters before its next token."""

    def first_chunks(self) -> list[Json]:
        """The prompts, where they are to be echoed."""
        count = len(self.jobs) * self.n
        told = [(index, self._prompts[index // self.n]) for index in range(count)]
        return [
            self.as_chunk([{"index": index, "text": prompt, "logprobs": None, "finish_reason": None}])
            for index, prompt in told
            if prompt
        ]

    def whole_choice(self, index: int, done: Completion) -> Json:
        """The text of a choice and its log-probabilities."""
        logprobs = None
        if done.logprobs:
            logprobs = self._logprobs(index, done.token_ids, done.logprobs, done.top_logprobs)
        return {"text": self._prompts[index // self.n] + done.text, "logprobs": logprobs}

    def token_choice(self, index: int, token: StreamedToken) -> Json:
        """The same of one token."""
        logprobs = None
        if token.logprob is not None:
            logprobs = self._logprobs(index, [token.token_id], [token.logprob], [token.top_logprobs or {}])
        return {"text": token.text, "logprobs": logprobs}

    def end_choice(self) -> Json:
        """The same where nothing is left."""
        return {"text": "", "logprobs": None}

    def _logprobs(self, index: int, ids: list[int], chosen: list[float], tops: list[dict[int, float]]) -> Json:
        texts, offsets = [self.texts.text(token) for token in ids], []
        at = self._offsets.get(index, len(self._prompts[index // self.n]))
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {
            "tokens": texts,
            "token_logprobs": list(map(said, chosen)),
            "top_logprobs": [
                {self.texts.text(token): said(value) for token, value in reversed(top.items())} for top in tops
            ],
            "text_offset": offsets,
        }
