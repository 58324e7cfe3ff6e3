"""`ee-tuning chat`: a conversation at a terminal, in the words of the model's chat template, answers streamed as they are made."""
import sys
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.generation.command import colours_of
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.topology import init_parallel, leave_parallel

HELP = "Empty line or Ctrl-D: leave. /reset: forget what was said."

Message = dict[str, str]
"""role and content, as chat templates take them."""


def chat(config: Config, *, system: str | None = None, show_exits: bool = False, ask: Callable[[], str] | None = None) -> None:
    """Reads what the user says, a line at a time, and answers, until an empty line or the end of input.

    Raises InputError where the tokenizer has no chat template, and under a launcher of several processes.
    """
    topology = init_parallel(config.parallel)
    if topology.world_size > 1:
        raise InputError(f"chat takes one process, got {topology.world_size}; start it without torchrun")
    llm = EarlyExitLLM.from_config(config, topology)
    if not getattr(llm.tokenizer, "chat_template", None):
        raise InputError("chat needs a tokenizer with a chat template, and this model's has none; use `ee-tuning generate`")
    console = Console(highlight=False, soft_wrap=True)
    colours = colours_of(llm) if show_exits else {}
    beginning: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    console.print(HELP, style="dim")
    while (said := _next_line(ask or _ask)) is not None:
        if said == "/reset":
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": said})
        try:
            messages.append({"role": "assistant", "content": answer(llm, messages, console, colours)})
        except InputError as error:  # too long by now, most often: the conversation so far is not lost
            messages.pop()
            console.print(f"{error}; /reset begins anew", style="red")
    leave_parallel()


def answer(llm: EarlyExitLLM, messages: list[Message], console: Console, colours: dict[int, str]) -> str:
    """What the model says to `messages`, streamed to the console."""
    prompt = llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    completions: list[Completion] = []
    for token in llm.stream([prompt], completions, adds_special_tokens=False):
        console.print(Text(token.text, style=colours.get(token.exit_layer, "")), end="")
        sys.stdout.flush()
    console.print()
    return completions[0].text


def _ask() -> str:
    return input("> ")


def _next_line(ask: Callable[[], str]) -> str | None:
    try:
        return ask().strip() or None
    except (EOFError, KeyboardInterrupt):
        return None
