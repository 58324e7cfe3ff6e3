"""Encodes conversations by the tokenizer's chat template, and marks the tokens of the assistant's words.

Few templates mark the assistant's words themselves (`{% generation %}`). For the others, each assistant turn is
rendered as the last message, after the prompt that the template gives for the messages before it. If the whole
conversation begins with that text, the turn is marked there. Templates of thinking models drop the thoughts of earlier
turns: a turn that is changed in this way gets a text of its own, which ends with it and contains the earlier turns as
the model saw them.
"""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from ee_tuning.data.chat_template import ChatTemplate
from ee_tuning.data.messages import MESSAGES, check_characters
from ee_tuning.data.records import Conversation
from ee_tuning.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINK, _THOUGHT = "<think>", "</think>"
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of messages that hold thoughts, apart from the content."""

Marked = tuple[list[int], list[bool]]
"""Token ids, and which of them are the assistant's words."""
Span = tuple[int, int]
"""First character, and the one after the last."""


class _Turn(NamedTuple):
    """An assistant turn as the model generates it."""

    text: str
    """Text that ends with the turn, or with what the template appends to it."""
    start: int
    stop: int
    """Position after the end-of-turn token."""
    words: str
    """Content of the turn; empty if it begins with thoughts."""


class ChatFormat:
    """A tokenizer with its chat template, or with `template` (see `ChatTemplate`)."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None) -> None:
        self._tokenizer, self._template = tokenizer, ChatTemplate(tokenizer, template)
        ends = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
        self._end = re.compile(r"\s*(?:" + "|".join(map(re.escape, ends)) + ")") if ends else None
        self._ends = tuple(ends)

    def encode(self, conversation: Conversation) -> list[Marked]:
        """Encodes the conversation as one text, or several where a template renders earlier turns differently from the
        last.

        The assistant's words include its end-of-turn token, and each of its turns is marked once. Raises InputError
        where there is no template, it refuses the messages, or the assistant's words can not be found in its output.
        """
        try:
            source = self._template.source(has_tools=conversation.tools is not None)
        except InputError as error:
            raise InputError(f"{conversation.where()}: {error}") from error
        if _GENERATION_BLOCK.search(source):
            encoded = self._render(
                conversation, conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            marked = encoded["input_ids"], [bool(each) for each in encoded["assistant_masks"]]
            return [self._without_end(*marked) if _is_cut(conversation) else marked]
        texts = self._texts(conversation)
        if not self._tokenizer.is_fast:
            raise InputError(
                "chat messages need a fast tokenizer (tokenizer.json), which maps tokens to characters, and the one "
                f"in {self._tokenizer.name_or_path} is slow; convert it, or give texts"
            )
        return [self._tokenized(*each) for each in texts]

    def _tokenized(self, text: str, spans: list[Span]) -> Marked:
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"], _tokens_within(encoded["offset_mapping"], spans)

    def _render(self, conversation: Conversation, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            rendered = self._template.render(messages, conversation.tools, **options)
        except InputError as error:
            raise InputError(f"{conversation.where()}: {error}") from error
        if isinstance(rendered, str):  # templates can write any character
            check_characters(rendered, MESSAGES, conversation.where)
        return rendered

    def _texts(self, conversation: Conversation) -> list[tuple[str, list[Span]]]:
        """Returns texts that contain each assistant turn once, with the turns' spans."""
        whole: str = self._render(conversation, conversation.messages)
        found: dict[str, list[Span]] = {whole: []}
        turns = [
            self._turn(conversation, index)
            for index, each in enumerate(conversation.messages)
            if each["role"] == ASSISTANT
        ]
        for turn in reversed(turns):
            text, (start, stop) = self._place(turn, found, whole)
            if turn is turns[-1] and _is_cut(conversation):
                stop = self._before_end(text, start, stop)
            found.setdefault(text, []).insert(0, (start, stop))
        for spans in found.values():
            before = [0, *(stop for _, stop in spans)]
            if any(start >= stop or start < least for (start, stop), least in zip(spans, before, strict=False)):
                raise _unstable(conversation)
        return [each for each in reversed(found.items()) if each[1]] or [(whole, [])]

    def _place(self, turn: _Turn, found: dict[str, list[Span]], whole: str) -> tuple[str, Span]:
        """Returns the text in which the turn is marked, one of `found` or its own, and its span."""
        for text in found:
            if text.startswith(turn.text[: turn.stop]):
                return text, (turn.start, turn.stop)
        if turn.words and whole.startswith(turn.text[: turn.start]):
            place = len(whole) - len(whole[turn.start :].lstrip())
            if whole.startswith(turn.words, place):
                return whole, (turn.start, self._behind(whole, place + len(turn.words)))
        return turn.text, (turn.start, turn.stop)

    def _turn(self, conversation: Conversation, index: int) -> _Turn:
        """Renders turn `index` after the messages before it."""
        message = conversation.messages[index]
        prompt = self._prompt(conversation, index)
        own: str = self._render(conversation, conversation.messages[: index + 1])
        thought, words = _parts(message, prompt)
        if (
            own.startswith(prompt)
            and len(own) > len(prompt)
            and (thought or "").removeprefix(_THINK).strip() in own[len(prompt) :]
        ):
            turn = own[len(prompt) :]
            trimmed = turn.rstrip()  # the assistant generates nothing after the end-of-turn token
            stop = len(prompt) + len(trimmed if trimmed.endswith(self._ends) else turn)
            return _Turn(own, len(prompt), stop, "" if thought or _reasoning(message) else words)
        if thought is not None:  # some templates (R1's) drop even the last turn's thoughts
            return self._written_out(prompt, own, f"{thought}{_THOUGHT}\n\n{words}")
        start = self._start_of(words, prompt, own, self._before(conversation, index))
        if start is None:
            raise _unstable(conversation)
        return _Turn(own, start, self._behind(own, start + len(words)), words)

    def _prompt(self, conversation: Conversation, index: int) -> str:
        """Returns the prompt of turn `index`: the text that the model reads before it generates the turn."""
        if index:
            prompt: str = self._render(conversation, conversation.messages[:index], add_generation_prompt=True)
            return prompt
        first = conversation.messages[:1]  # transformers can not render an empty conversation
        own: str = self._render(conversation, first)
        header = str(self._render(conversation, first, add_generation_prompt=True)).removeprefix(own)
        if header and header in own:
            return own[: own.find(header) + len(header)]
        words = _parts(first[0], "")[1]
        if not words or words not in own:
            raise _unstable(conversation)
        head = own[: own.find(words)]
        shared = next(length for length in range(len(header), -1, -1) if head.endswith(header[:length]))
        return head[: len(head) - shared] + header

    def _before(self, conversation: Conversation, index: int) -> str:
        return str(self._render(conversation, conversation.messages[:index])).rstrip() if index else ""

    def _start_of(self, words: str, prompt: str, own: str, before: str) -> int | None:
        """Returns where `words` begin in `own`, which continues `before` differently from `prompt`, or None."""
        same = next(
            (place for place, pair in enumerate(zip(prompt, own, strict=False)) if pair[0] != pair[1]),
            min(len(prompt), len(own)),
        )
        last = len(own) - len(own[same:].lstrip())
        places = (place for place in range(last, len(before) - 1, -1) if own.startswith(words, place))
        return next(places, None) if words and own.startswith(before) else None

    def _written_out(self, prompt: str, own: str, said: str) -> _Turn:
        if prompt.rstrip().endswith(_THINK):
            said = said.removeprefix(_THINK)
            said = said.lstrip("\n") if prompt[-1].isspace() else said
        end = next((each for each in self._ends if own.rstrip().endswith(each)), "")
        text = prompt + said + end
        return _Turn(text, len(prompt), len(text), "")

    def _before_end(self, text: str, start: int, stop: int) -> int:
        """Returns where the words of a turn end that ends at `stop`, before its end-of-turn token or the template's
        whitespace.
        """
        said = text[start:stop].rstrip()
        return start + len(said) - len(next((each for each in self._ends if said.endswith(each)), ""))

    def _without_end(self, ids: list[int], marks: list[bool]) -> Marked:
        """Removes the mark from special tokens at the end of the last turn."""
        last = max((place for place, is_marked in enumerate(marks) if is_marked), default=-1)
        place = last
        while place >= 0 and marks[place] and not str(self._tokenizer.decode([ids[place]])).strip():
            place -= 1
        while place >= 0 and marks[place] and ids[place] in self._tokenizer.added_tokens_decoder:
            marks[place : last + 1] = [False] * (last + 1 - place)
            place -= 1
        return ids, marks

    def _behind(self, text: str, place: int) -> int:
        """Returns the position after the end-of-turn token at `place`, if there is one."""
        end = self._end.match(text, place) if self._end else None
        return end.end() if end else place


def _is_cut(conversation: Conversation) -> bool:
    return conversation.is_cut and conversation.messages[-1]["role"] == ASSISTANT


def is_mid_thought(prompt: str, answer: str) -> bool:
    """Whether a model's `answer` to `prompt` ends before its thought does. No template can render such a turn
    faithfully.
    """
    return _THOUGHT not in answer and (_THINK in answer or prompt.rstrip().endswith(_THINK))


def _reasoning(message: dict[str, Any]) -> str:
    return next((text.strip() for key in _REASONING if isinstance(text := message.get(key), str) and text.strip()), "")


def _parts(message: dict[str, Any], prompt: str) -> tuple[str | None, str]:
    """Returns the thought with its opening tag, and the rest of the answer.

    Returns None without a thought, or where the thought has a key of its own while `prompt` does not ask for thinking:
    templates may then drop it.
    """
    content = message.get("content")
    text = content.strip() if isinstance(content, str) else ""
    if _THOUGHT in text:
        thought, _, words = text.partition(_THOUGHT)
        return thought, words.strip()
    if prompt.rstrip().endswith(_THINK) and (reasoning := _reasoning(message)):
        return f"{_THINK}\n{reasoning}\n", text
    return None, text


def _unstable(conversation: Conversation) -> InputError:
    return InputError(
        f"{conversation.where()}: the assistant's words can not be located in the output of the chat template: it "
        "renders the beginning of a conversation differently from the whole; set data.chat_template to a file with a template "
        "that marks them by {% generation %}"
    )


def _tokens_within(offsets: list[tuple[int, int]], spans: list[Span]) -> list[bool]:
    """Marks the tokens that end within a span. A token that begins before it adds at most a space."""
    marks, index = [False] * len(offsets), 0
    for token, (first, stop) in enumerate(offsets):
        while index < len(spans) and spans[index][1] < stop:
            index += 1
        marks[token] = index < len(spans) and first < stop and spans[index][0] < stop
    return marks
