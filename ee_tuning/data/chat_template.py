"""Selects a tokenizer's chat template and renders messages by it. Failures become one-line errors."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ee_tuning.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT, TOOL_USE = "default", "tool_use"
"""Conventional names of templates: the default, and the one for chats with tools."""
_NAME = re.compile(r"[\w-]+")
_OTHER = "give another with --chat-template (data.chat_template)"

Messages = Sequence[dict[str, Any]]
"""Messages of a chat: role, content, and further keys for the template."""


def read_chat_template(path: str | None) -> str | None:
    """Reads the template from the file `path`. If there is no such file, `path` is a template's name; None is the
    tokenizer's own.

    Raises InputError where the file can not be read or is not Jinja.
    """
    if path is None or (_NAME.fullmatch(path) and not Path(path).exists()):
        return path
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"data.chat_template must be a file with a Jinja template; {path} can not be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"data.chat_template must be UTF-8 text, and {path} is not; convert it (iconv -t utf-8)"
        ) from error
    if not _is_jinja(text):
        raise InputError(
            f"data.chat_template must be a file with a Jinja template, and {path} holds no {{{{ or {{%, "
            "so it would render all messages alike; give another file"
        )
    return text


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


class UserTurn(NamedTuple):
    """The rendered text around a user's first message."""

    beginning: str
    """Everything before the message, default system prompt and special tokens included, without spaces at its end: many
    tokenizers have them in the tokens of the words behind them.
    """
    end: str
    """What closes the message: a special token, or the next line of the template."""


class ChatTemplate:
    """The chat template of a tokenizer: `given` (from `read_chat_template`), or its own."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", given: str | None) -> None:
        self._tokenizer, self._given = tokenizer, given

    def source(self, *, has_tools: bool = False) -> str:
        """Returns the Jinja text. Raises InputError where there is none, or several and none is selected."""
        own = self._tokenizer.chat_template
        named = {name: text for name, text in own.items() if isinstance(text, str)} if isinstance(own, dict) else {}
        if self._given is not None and _is_jinja(self._given):
            return self._given
        if self._given is not None:
            if self._given not in named:
                known = f"whose templates are {', '.join(sorted(named))}" if named else "which has none by name"
                raise InputError(
                    f"data.chat_template must be a file, or name a template of the tokenizer in {self._place} ({known}), got "
                    f"{self._given!r}, and there is no such file; give one of them"
                )
            return named[self._given]
        for name in (*((TOOL_USE,) if has_tools else ()), DEFAULT):
            if name in named:
                return named[name]
        if named:
            raise InputError(
                f"the tokenizer in {self._place} has several chat templates ({', '.join(sorted(named))}) and none of the name "
                f"{DEFAULT}; give the name of one, or a file, with --chat-template (data.chat_template)"
            )
        if not own or not isinstance(own, str):
            raise InputError(
                f"messages need a chat template, and the tokenizer in {self._place} has no chat template; set "
                "data.chat_template (--chat-template) to a file with one"
            )
        return own

    def render(self, messages: Messages, tools: list[Any] | None = None, **options: Any) -> Any:
        """Renders `messages`: returns a text, or the form that `options` request from transformers.

        Raises InputError where there is no template, it is not Jinja, or it refuses the messages or fails on them.
        """
        source = self.source(has_tools=tools is not None)
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=tools, chat_template=source, **{"tokenize": False, **options}
            )
        except Exception as error:  # templates run code of their own, which may raise anything
            raise InputError(self._shown(error)) from error

    def end_of_turn_id(self) -> int | None:
        """Returns the special token with which the template closes assistant turns, or None.

        It ends an answer even if the model's config does not name it (Llama 3's <|eot_id|> beside <|end_of_text|>).
        """
        said = "Yes, indeed."
        try:
            text: str = self.render([{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": said}])
        except InputError:
            return None
        _, found, behind = text.rpartition(said)
        ids = (
            self._tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"] if found and behind.strip() else []
        )
        return ids[0] if ids and ids[0] in self._tokenizer.added_tokens_decoder else None

    def user_turn(self) -> UserTurn:
        """Returns what the template has around a user's first message. Raises InputError where it does not render the
        message as it is, or closes it with nothing.
        """
        return self._user_turn

    @cached_property
    def _user_turn(self) -> UserTurn:
        said = "Is it so?"
        beginning, found, behind = self.render(
            [{"role": "user", "content": said}], add_generation_prompt=True
        ).rpartition(said)
        if not found:
            raise InputError(f"the chat template does not show a user's message as it is; {_OTHER}")
        behind = behind.lstrip()
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values()]
        closing = max((token for token in special if token and behind.startswith(token)), key=len, default="")
        if not (end := closing or behind.partition("\n")[0].rstrip()):
            raise InputError(f"the chat template has nothing behind a user's message that would end it; {_OTHER}")
        return UserTurn(beginning.rstrip(" "), end)

    @property
    def _place(self) -> str:
        return str(self._tokenizer.name_or_path)

    def _shown(self, error: Exception) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

        reason = " ".join(str(error).split())[:200]
        if isinstance(error, TemplateSyntaxError):
            return f"the chat template is no Jinja: {reason} (line {error.lineno}); mend it, or {_OTHER}"
        if isinstance(error, UndefinedError):
            return f"the chat template asks for what is not there: {reason}; mend it or the messages, or {_OTHER}"
        if type(error) is TemplateError:  # raised by raise_exception
            return f"the chat template refuses the messages: {reason}; mend or remove them, or {_OTHER}"
        return (
            f"the chat template fails on the messages: {type(error).__name__}: {reason}; mend it or them, or {_OTHER}"
        )
