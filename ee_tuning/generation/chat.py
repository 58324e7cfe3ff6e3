"""`ee-tuning chat`: a conversation at a terminal by the model's chat template, with streamed answers."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from ee_tuning.config import Config
from ee_tuning.data.chat_template import ChatTemplate, read_chat_template
from ee_tuning.errors import InputError
from ee_tuning.generation.command import colours_of
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.topology import destroy_parallel, init_parallel

HELP = "Empty line or Ctrl-D: leave. Ctrl-C: end an answer; twice, or where nothing is being said: leave. /reset: forget what was said."

Message = dict[str, str]
"""Role and content, as in chat templates."""


class Talk(NamedTuple):
    """The model, and the console where its answers appear."""

    llm: EarlyExitLLM
    template: ChatTemplate
    console: Console
    colours: dict[int, str]
    stop_token_ids: tuple[int, ...]
    """Tokens that end an answer, beside the model's end of text."""


def chat(
    config: Config, *, system: str | None = None, show_exits: bool = False, ask: Callable[[], str] | None = None
) -> None:
    """Reads the user's messages, one per line, and answers them, until an empty line or the end of input.

    Ctrl-C ends an answer, whose beginning stays in the conversation. A second one, or one at the prompt, ends the
    conversation. Raises InputError where the tokenizer has no chat template, or one that refuses the beginning of every
    conversation, and under a launcher of several processes.
    """
    topology = init_parallel(config.parallel)
    if topology.world_size > 1:
        raise InputError(f"chat takes one process, got {topology.world_size}; start it without torchrun")
    given = read_chat_template(config.data.chat_template)
    llm = EarlyExitLLM.from_config(config, topology)
    template = ChatTemplate(llm.tokenizer, given)
    talk = Talk(
        llm,
        template,
        Console(highlight=False, soft_wrap=True),
        colours_of(llm) if show_exits else {},
        stop_ids_of(llm, template),
    )
    beginning: list[Message] = [{"role": "system", "content": system}] if system else []
    _check_template(talk.template, beginning)
    messages = list(beginning)
    talk.console.print(HELP, style="dim")
    while (said := _next_line(ask or _ask)) is not None:
        if said == "/reset":
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": said})
        try:
            words = answer(talk, messages)
        except InputError as error:  # most often the conversation has become too long; earlier messages are kept
            messages.pop()
            talk.console.print(f"{error}; /reset begins anew", style="red", markup=False)
            continue
        if words is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": words})
    destroy_parallel()


def stop_ids_of(llm: EarlyExitLLM, template: ChatTemplate) -> tuple[int, ...]:
    """Returns the token ids that end an answer in a chat, beside the model's end of text: those that the user gave, and
    the template's end of turn.
    """
    own, end = llm.defaults.stop_token_ids, template.end_of_turn_id()
    return own if end is None or end >= llm.model.config.vocab_size or llm.defaults.ignore_eos else (*own, end)


def _check_template(template: ChatTemplate, beginning: list[Message]) -> None:
    """Raises InputError where no conversation can begin."""
    try:
        template.render([*beginning, {"role": "user", "content": "?"}], add_generation_prompt=True)
    except InputError as error:
        raise InputError(f"{error}" + ("; or leave --system out" if beginning else "")) from error


def answer(talk: Talk, messages: list[Message]) -> str | None:
    """Streams the model's answer to `messages` to the console and returns it. Returns its beginning if Ctrl-C ended it,
    or None if no word had come yet.
    """
    prompt = talk.template.render(messages, add_generation_prompt=True)
    completions: list[Completion] = []
    shown = ""
    answering = talk.llm.stream([prompt], completions, adds_special_tokens=False, stop_token_ids=talk.stop_token_ids)
    with _interrupted() as is_interrupted, closing(answering) as stream:
        for token in stream:
            shown += token.text
            talk.console.print(Text(token.text, style=talk.colours.get(token.exit_layer, "")), end="")
            sys.stdout.flush()
            if is_interrupted() and not token.is_last:
                break
    talk.console.print()
    return shown or (None if is_interrupted() else "")


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C was pressed. A second Ctrl-C raises KeyboardInterrupt."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    # An interrupt in the middle of a step would leave keys and values half written.
    former = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, former)


def _ask() -> str:
    return input("> ")


def _next_line(ask: Callable[[], str]) -> str | None:
    try:
        return ask().strip() or None
    except UnicodeDecodeError as error:
        raise InputError(
            f"what is said must be UTF-8 text, but standard input is not: {error}; convert it first"
        ) from error
    except (EOFError, KeyboardInterrupt):
        return None
