"""Answers of /v1/completions."""

from ee_tuning.generation.completion import Completion, StreamedToken
from ee_tuning.generation.job import Job
from ee_tuning.generation.scoring import Score
from ee_tuning.openai_protocol.answer import Answer, Json, said
from ee_tuning.openai_protocol.schemas import CompletionBody
from ee_tuning.openai_protocol.text_offsets import TextOffsets
from ee_tuning.openai_protocol.token_texts import TokenTexts


class TextAnswer(Answer):
    """Texts."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, body: CompletionBody, jobs: list[Job], model_name: str, texts: TokenTexts, prompts: list[str]):
        """`prompts` are the texts that an echo repeats."""
        super().__init__(body, jobs, model_name, texts)
        self._prompts = prompts if body.echo else [""] * len(jobs)
        self._tells_logprobs = body.logprobs is not None
        self._awaits_scores = bool(body.echo) and (self._tells_logprobs or body.max_tokens == 0)
        self._offsets = [TextOffsets(self._prompts[place]) for place in range(len(jobs)) for _ in range(self.n)]
        self._of_prompts: dict[int, Json] = {}
        """Place of a job -> the part of its choices about the prompt, beside its text."""

    def first_chunks(self) -> list[Json]:
        """Returns the prompts, if they are to be echoed without their log-probabilities."""
        if self._awaits_scores:
            return []
        return [chunk for place in range(len(self.jobs)) for chunk in self._prompt_chunks(place)]

    def take_prompt(self, place: int, score: Score) -> list[Json]:
        """Takes the log-probabilities of a prompt, and returns the chunks of its echo."""
        told: Json = {}
        if self._tells_logprobs:
            told["logprobs"] = self._prompt_logprobs(place, score)
        if self._tells_exits:
            told["prompt_exit_layers"] = [None, *score.exit_layers]
        self._of_prompts[place] = told
        return self._prompt_chunks(place)

    def whole_choice(self, index: int, done: Completion) -> Json:
        """Returns the text of a choice and its log-probabilities."""
        place, logprobs = index // self.n, None
        if done.logprobs:
            logprobs = self._logprobs(index, done.token_ids, done.logprobs, done.top_logprobs)
        of_prompt = self._of_prompts.get(place, {})
        if before := of_prompt.get("logprobs"):
            logprobs = {name: before[name] + (logprobs[name] if logprobs else []) for name in before}
        return {**of_prompt, "text": self._prompts[place] + done.text, "logprobs": logprobs}

    def token_choice(self, index: int, token: StreamedToken) -> Json:
        """Returns the text of one token and its log-probabilities."""
        logprobs = None
        if token.logprob is not None:
            logprobs = self._logprobs(index, [token.token_id], [token.logprob], [token.top_logprobs or {}])
        return {"text": token.text, "logprobs": logprobs}

    def end_choice(self) -> Json:
        """Returns the empty text that ends a choice."""
        return {"text": "", "logprobs": None}

    def _prompt_chunks(self, place: int) -> list[Json]:
        told = {"text": self._prompts[place], "logprobs": None, **self._of_prompts.get(place, {})}
        if not any(told.values()):
            return []
        indices = range(place * self.n, (place + 1) * self.n)
        return [self.as_chunk([{"index": index, **told, "finish_reason": None}]) for index in indices]

    def _prompt_logprobs(self, place: int, score: Score) -> Json:
        """Returns the log-probabilities of a prompt. The first token has none, since no token precedes it."""
        ids = list(self.jobs[place].prompt_ids)
        for choice in range(place * self.n, (place + 1) * self.n):
            offsets = [self._offsets[choice].next(self.texts.bytes_of(token)) for token in ids]
        tops = score.top_logprobs or [{}] * len(score.logprobs)
        return {
            "tokens": [self.texts.text(token) for token in ids],
            "token_logprobs": [None, *map(said, score.logprobs)],
            "top_logprobs": [None, *map(self._top, score.token_ids, score.logprobs, tops)],
            "text_offset": offsets,
        }

    def _logprobs(self, index: int, ids: list[int], chosen: list[float], tops: list[dict[int, float]]) -> Json:
        return {
            "tokens": [self.texts.text(token) for token in ids],
            "token_logprobs": list(map(said, chosen)),
            "top_logprobs": list(map(self._top, ids, chosen, tops)),
            "text_offset": [self._offsets[index].next(self.texts.bytes_of(token)) for token in ids],
        }

    def _top(self, chosen: int, logprob: float, top: dict[int, float]) -> Json:
        """Returns the likeliest tokens by their texts, and the actual one. Of tokens with equal texts the likeliest
        counts.
        """
        told = {self.texts.text(chosen): said(logprob)}
        return told | {self.texts.text(token): said(value) for token, value in reversed(top.items())}
