"""`ee-tuning generate`: prompts to completions at a terminal or as JSON. Under torchrun the first rank prints."""
import json
import sys
from collections import Counter

from rich.console import Console
from rich.text import Text

from ee_tuning.checkpoint.aside import on_first_rank
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.generation.llm import Completion, EarlyExitLLM
from ee_tuning.parallel.topology import init_parallel, leave_parallel

EXIT_COLOURS = ("bright_green", "green", "cyan", "bright_blue", "blue", "magenta", "bright_magenta", "yellow")
"""By exit, shallow to deep; tokens that did not leave early keep the terminal's colour."""


def generate(config: Config, prompts: list[str], *, as_json: bool = False, show_exits: bool = False) -> None:
    """Loads the model and its exits, completes the prompts as one batch, and prints them. The prompt `-` is standard input."""
    topology = init_parallel(config.parallel)
    if topology.dp > 1:
        raise InputError(f"generate takes tensor × pipeline = {topology.tp} × {topology.pp} processes, got {topology.world_size}; "
                         f"launch {topology.num_in_replica}, or change parallel.*")
    if "-" in prompts:  # all ranks share one standard input: the first reads it
        text = on_first_rank(topology, _read_standard_input)
        prompts = [text if prompt == "-" else prompt for prompt in prompts]
    llm = EarlyExitLLM.from_config(config, topology)
    if not topology.is_logging_rank:
        llm.generate(prompts)
    elif as_json:
        for completion in llm.generate(prompts):
            print(json.dumps(as_record(completion), ensure_ascii=False), flush=True)
    else:
        _print_text(llm, prompts, show_exits)
    leave_parallel()


def as_record(completion: Completion) -> dict[str, object]:
    """What `--json` prints of a completion."""
    return {"prompt": completion.prompt, "text": completion.text, "token_ids": completion.token_ids,
            "exit_layers": completion.exit_layers, "confidences": [round(c, 6) for c in completion.confidences],
            "tokens_per_second": round(completion.tokens_per_second, 2), "finish_reason": completion.finish_reason}


def _read_standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"a prompt must be UTF-8 text, but standard input is not: {error}; convert it first") from error


def _print_text(llm: EarlyExitLLM, prompts: list[str], show_exits: bool) -> None:
    """One prompt streams as it is made; several come whole, one after the other. A pipe gets the completions alone, as they are."""
    out = Console(highlight=False, soft_wrap=True)
    colours = _colours(llm) if show_exits else {}

    def show(text: str, style: str = "") -> None:
        if out.is_terminal:
            out.print(Text(text, style=style), end="")
        elif style != "dim":
            sys.stdout.write(text)  # rich would turn tabs into spaces
        sys.stdout.flush()

    shown: list[list[tuple[str, int]]] = [[] for _ in prompts]
    completions: list[Completion] = []
    streams = len(prompts) == 1
    if streams:
        show(prompts[0], "dim")
    for token in llm.stream(prompts, completions):
        shown[token.index].append((token.text, token.exit_layer))
        if streams:
            show(token.text, colours.get(token.exit_layer, ""))
    for prompt, parts in zip(prompts, shown, strict=True):
        if not streams:
            show(prompt, "dim")
            for text, layer in parts:
                show(text, colours.get(layer, ""))
        show("\n")
    _print_summary(llm, completions, colours)


def _colours(llm: EarlyExitLLM) -> dict[int, str]:
    early = [layer for layer in llm.exit_layers if layer < llm.num_layers]
    return {layer: EXIT_COLOURS[i * len(EXIT_COLOURS) // max(len(early), 1)] for i, layer in enumerate(early)}


def _print_summary(llm: EarlyExitLLM, completions: list[Completion], colours: dict[int, str]) -> None:
    # On stderr, so that a pipe gets the completion alone.
    console = Console(stderr=True, highlight=False)
    layers = [layer for c in completions for layer in c.exit_layers]
    seconds = max(c.seconds for c in completions)
    histogram = Counter(layers)
    summary = Text(f"{len(layers)} tokens in {seconds:.2f} s, {len(layers) / seconds:.1f} tokens/s; "
                   f"mean depth {sum(layers) / len(layers):.1f} of {llm.num_layers} layers; left at ")
    for i, layer in enumerate(sorted(histogram)):
        name = "the end" if layer == llm.num_layers else f"layer {layer}"
        summary.append(", " if i else "").append(f"{name}: {histogram[layer]}", style=colours.get(layer, ""))
    console.print(summary, soft_wrap=True)
