"""Conversations become token ids by the tokenizer's chat template, with a mark on the assistant's words.

Few templates mark the assistant's words themselves (`{% generation %}`). For the others, a turn of the assistant begins where the messages
before it, rendered with the generation prompt, end. It ends where the messages up to it, rendered alone, end, its end-of-turn token
included; or, for templates that render the last turn otherwise than earlier ones, behind its content.
"""
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ee_tuning.data.documents import MESSAGES, Conversation, check_characters
from ee_tuning.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_chat_template(path: str | None) -> str | None:
    """The template in the file `path`; None for the tokenizer's own. Raises InputError where it can not be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"data.chat_template must be a file with a Jinja template; {path} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"data.chat_template must be UTF-8 text, and {path} is not; convert it (iconv -t utf-8)") from error


class ChatFormat:
    """A tokenizer with its chat template, or with `template`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str | None) -> None:
        self._tokenizer, self._template = tokenizer, template
        ends = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
        self._end = re.compile(r"\s*(?:" + "|".join(map(re.escape, ends)) + ")") if ends else None
        self._ends = tuple(ends)

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them are the assistant's words (its end-of-turn token is one).

        Raises InputError where there is no template, it refuses the messages, or the assistant's words can not be found in what it makes.
        """
        template = self._template or self._tokenizer.chat_template
        if not isinstance(template, str):
            has = "several chat templates" if template else "no chat template"
            raise InputError(f"{conversation.where()}: messages need a chat template, and the tokenizer in "
                             f"{self._tokenizer.name_or_path} has {has}; set data.chat_template to a file with one")
        if _GENERATION_BLOCK.search(template):
            encoded = self._render(conversation, conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return encoded["input_ids"], [bool(each) for each in encoded["assistant_masks"]]
        text = self._render(conversation, conversation.messages)
        spans = self._assistant_spans(conversation, text)
        if not self._tokenizer.is_fast:
            raise InputError("chat messages need a fast tokenizer (tokenizer.json), which tells the characters of each token, and the one "
                             f"in {self._tokenizer.name_or_path} is slow; convert it, or give texts")
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        return encoded["input_ids"], _tokens_within(encoded["offset_mapping"], spans)

    def _render(self, conversation: Conversation, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            rendered = self._tokenizer.apply_chat_template(messages, tools=conversation.tools, chat_template=self._template,
                                                           **{"tokenize": False, **options})
        except Exception as error:  # templates run code of their own: any error may come out of them
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{conversation.where()}: the chat template refuses the messages: {reason}; mend or remove them") from error
        if isinstance(rendered, str):  # templates can write any character
            check_characters(rendered, MESSAGES, conversation.where)
        return rendered

    def _assistant_spans(self, conversation: Conversation, text: str) -> list[tuple[int, int]]:
        """First character of each of the assistant's turns in `text`, and the one behind its last."""
        spans = []
        for index, message in enumerate(conversation.messages):
            if message["role"] == ASSISTANT:
                start = len(self._prefix(conversation, index, text))
                spans.append((start, self._end_of_turn(conversation, index, text, start)))
        if any(start > stop or start < before for (start, stop), before in zip(spans, [0, *(stop for _, stop in spans)], strict=False)):
            raise _unstable(conversation)
        return spans

    def _prefix(self, conversation: Conversation, index: int, text: str) -> str:
        """What stands before turn `index` in `text`."""
        prefix: str = self._render(conversation, conversation.messages[:index], add_generation_prompt=True)
        if not text.startswith(prefix):
            raise _unstable(conversation)
        return prefix

    def _end_of_turn(self, conversation: Conversation, index: int, text: str, start: int) -> int:
        through: str = self._render(conversation, conversation.messages[:index + 1])
        if text.startswith(through) and len(through) > start:
            turn = text[start: len(through)]
            trimmed = turn.rstrip()  # nothing that follows the end-of-turn token is said by the assistant
            return start + len(trimmed if trimmed.endswith(self._ends) else turn)
        content = conversation.messages[index].get("content")
        content = content.strip() if isinstance(content, str) else ""
        place = len(text) - len(text[start:].lstrip())
        if not content or not text.startswith(content, place):
            raise _unstable(conversation)
        end = self._end.match(text, place + len(content)) if self._end else None
        return end.end() if end else place + len(content)


def _unstable(conversation: Conversation) -> InputError:
    return InputError(f"{conversation.where()}: the assistant's words can not be found in what the chat template makes of the messages: it "
                      "renders the beginning of a conversation otherwise than the whole; set data.chat_template to a file with a template "
                      "that marks them by {% generation %}")


def _tokens_within(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens end within a span: one that begins before it brings at most a space along."""
    marks, index = [False] * len(offsets), 0
    for token, (first, stop) in enumerate(offsets):
        while index < len(spans) and spans[index][1] < stop:
            index += 1
        marks[token] = index < len(spans) and first < stop and spans[index][0] < stop
    return marks
