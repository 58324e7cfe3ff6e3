"""`ee-tuning generate`: prompts to completions at a terminal or as JSON lines. Under torchrun the first rank prints."""
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from ee_tuning.checkpoint.aside import on_first_rank
from ee_tuning.config import Config, GenerationSection
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.llm import EarlyExitLLM, Job
from ee_tuning.generation.prompts import jobs_of, read_prompts
from ee_tuning.parallel.topology import Topology, init_parallel, leave_parallel

EXIT_COLOURS = ("bright_green", "green", "cyan", "bright_blue", "blue", "magenta", "bright_magenta", "yellow")
"""By exit, shallow to deep; tokens that did not leave early keep the terminal's colour."""


def generate(config: Config, prompts: list[str], *, prompts_file: Path | None = None, output: Path | None = None, as_json: bool = False,
             show_exits: bool = False) -> int:
    """Loads the model and its exits, completes the prompts together, and prints them. The prompt `-` is standard input.

    Those of `prompts_file`, a line each, bring wishes of their own; a line that can not be done gets its error, and the exit code is 2.
    Records go to `output`, if given, line by line.
    """
    topology = init_parallel(config.parallel)
    if topology.dp > 1:
        raise InputError(f"generate takes tensor × pipeline = {topology.tp} × {topology.pp} processes, got {topology.world_size}; "
                         f"launch {topology.num_in_replica}, or change parallel.*")
    if "-" in prompts:  # all ranks share one standard input: the first reads it
        text = on_first_rank(topology, _read_standard_input)
        prompts = [text if prompt == "-" else prompt for prompt in prompts]
    lines = read_prompts(prompts_file) if prompts_file is not None else []
    file = _open_output(output, topology) if output is not None else None
    llm = EarlyExitLLM.from_config(config, topology)
    options, jobs, refused = jobs_of(llm, prompts, lines)
    completions: list[Completion] = []
    try:
        if not as_json and file is None and prompts_file is None and topology.is_logging_rank:
            _print_text(llm, jobs, options, completions, show_exits)
        else:
            _write_records(llm, jobs, options, completions, refused, file or sys.stdout if topology.is_logging_rank else None)
    finally:
        if file is not None:
            file.close()
    if topology.is_logging_rank and completions and not as_json:
        _print_summary(llm, completions, colours_of(llm) if show_exits else {})
    leave_parallel()
    return 2 if refused or any(c.error for c in completions) else 0


def as_record(completion: Completion) -> dict[str, object]:
    """What `--json` prints of a completion."""
    if completion.error:
        return {"prompt": completion.prompt, "error": completion.error}
    told, statistics = completion, completion.statistics
    return {"prompt": told.prompt, "index": told.index, "text": told.text, "token_ids": told.token_ids, "exit_layers": told.exit_layers,
            "confidences": [round(c, 6) for c in told.confidences],
            **({"logprobs": told.logprobs, "top_logprobs": told.top_logprobs} if told.logprobs else {}),
            "tokens_per_second": round(told.tokens_per_second, 2), "finish_reason": told.finish_reason,
            "statistics": {"exit_histogram": told.exit_histogram, "mean_depth": round(told.mean_depth, 3),
                           "catch_up_tokens": statistics.num_catch_up, "drafted": statistics.num_drafted,
                           "accepted": statistics.num_accepted, "reused_tokens": statistics.num_reused,
                           "tokens_read_again": statistics.num_read_again,
                           "seconds_waiting": round(statistics.seconds_waiting, 4),
                           "seconds_to_first_token": round(statistics.seconds_to_first_token, 4), "seconds": round(told.seconds, 4)}}


def colours_of(llm: EarlyExitLLM) -> dict[int, str]:
    """A colour for each early exit."""
    early = [layer for layer in llm.exit_layers if layer < llm.num_layers]
    return {layer: EXIT_COLOURS[i * len(EXIT_COLOURS) // max(len(early), 1)] for i, layer in enumerate(early)}


def _read_standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"a prompt must be UTF-8 text, but standard input is not: {error}; convert it first") from error


def _open_output(path: Path, topology: Topology) -> TextIO | None:
    """On the first rank. Before the model is loaded: a path that can not be written should not cost that."""
    if not topology.is_logging_rank:
        return None
    try:
        return path.open("w")
    except OSError as error:
        raise InputError(f"--output must name a file that can be written, got {path}: {error.strerror}") from error


def _write_records(llm: EarlyExitLLM, jobs: list[Job], options: GenerationSection, completions: list[Completion],
                   refused: list[Completion], file: TextIO | None) -> None:
    """A line for each completion, in the prompts' order, once all are there; at once for prompts that were refused."""
    def write(completion: Completion) -> None:
        if file is not None:
            print(json.dumps(as_record(completion), ensure_ascii=False), file=file, flush=True)

    for completion in refused:
        write(completion)
    for _ in llm.run(jobs, completions, options, keeps_errors=len(jobs) > 1, shows_text=False):
        pass
    for completion in completions:
        write(completion)


def _print_text(llm: EarlyExitLLM, jobs: list[Job], options: GenerationSection, completions: list[Completion], show_exits: bool) -> None:
    """One completion streams as it is made; several come whole, one after the other. A pipe gets the completions alone, as they are."""
    out = Console(highlight=False, soft_wrap=True)
    colours = colours_of(llm) if show_exits else {}

    def show(text: str, style: str = "") -> None:
        if out.is_terminal:
            out.print(Text(text, style=style), end="")
        elif style != "dim":
            sys.stdout.write(text)  # rich would turn tabs into spaces
        sys.stdout.flush()

    shown: dict[tuple[int, int], list[tuple[str, int]]] = {}
    streams = len(jobs) == 1 and jobs[0].params.n == 1
    if streams:
        show(jobs[0].prompt, "dim")
    for token in llm.run(jobs, completions, options):
        shown.setdefault((token.index, token.completion), []).append((token.text, token.exit_layer))
        if streams:
            show(token.text, colours.get(token.exit_layer, ""))
    for (index, _), parts in sorted(shown.items()):
        if not streams:
            show(jobs[index].prompt, "dim")
            for text, layer in parts:
                show(text, colours.get(layer, ""))
        show("\n")


def _print_summary(llm: EarlyExitLLM, completions: list[Completion], colours: dict[int, str]) -> None:
    # On stderr, so that a pipe gets the completion alone.
    console = Console(stderr=True, highlight=False)
    layers = [layer for c in completions for layer in c.exit_layers]
    if not layers:
        return
    seconds = max(c.seconds for c in completions)
    histogram = Counter(layers)
    first = min(c.statistics.seconds_to_first_token for c in completions if not c.error)
    summary = Text(f"{len(layers)} tokens in {seconds:.2f} s, {len(layers) / seconds:.1f} tokens/s, the first after {first:.2f} s; "
                   f"mean depth {sum(layers) / len(layers):.1f} of {llm.num_layers} layers; left at ")
    for i, layer in enumerate(sorted(histogram)):
        name = "the end" if layer == llm.num_layers else f"layer {layer}"
        summary.append(", " if i else "").append(f"{name}: {histogram[layer]}", style=colours.get(layer, ""))
    caught_up, drafted = (sum(getattr(c.statistics, name) for c in completions) for name in ("num_catch_up", "num_drafted"))
    if drafted:
        accepted = sum(c.statistics.num_accepted for c in completions)
        summary.append(f"; {drafted} drafted, {accepted / drafted:.0%} accepted")
    elif caught_up:
        summary.append(f"; {caught_up} taken deeper later")
    if reused := sum(c.statistics.num_reused for c in completions):
        summary.append(f"; {reused} tokens of prompts were known from others")
    if llm.engine is not None:
        summary.append(f"; {llm.engine.seconds_in_heads / seconds:.0%} of the time in heads; "
                       f"KV cache {llm.engine.cache.num_bytes / 1e6:.1f} MB")
    console.print(summary, soft_wrap=True)
