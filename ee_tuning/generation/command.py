"""`ee-tuning generate`: prompts to completions at a terminal or as JSON lines.

Under torchrun rank 0 prints, and processes beyond tensor × pipeline are replicas, which share the prompts.
"""

import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ee_tuning.config import Config, GenerationSection
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.llm import EarlyExitLLM, Job
from ee_tuning.generation.many import deliver
from ee_tuning.generation.output_file import budget_exit_in, check_output, owned_output
from ee_tuning.generation.prompts import Line, read_prompts, requests_of
from ee_tuning.generation.replicas import over_replicas
from ee_tuning.notices import say
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.time_report import check_profile_folder, time_report
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel
from ee_tuning.storage.apart import check_beside

EXIT_COLOURS = ("bright_green", "green", "cyan", "bright_blue", "blue", "magenta", "bright_magenta", "yellow")
"""Colours of exits, shallow to deep; tokens that did not leave early keep the terminal's colour."""


def generate(
    config: Config,
    prompts: list[str],
    *,
    prompts_file: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    as_json: bool = False,
    show_exits: bool = False,
    profile: Path | None = None,
) -> int:
    """Loads the model and its exits, completes the prompts together, and prints them. The prompt `-` is standard input.

    Lines of `prompts_file` may have options of their own; a line that fails yields a record with its error, and the
    exit code is 2. Records are written to `output`, if given: see output_file.py. With `profile` the decoding is
    measured, and a report of the time by part is written to this folder.
    """
    topology = init_parallel(config.parallel)
    if profile is not None:
        on_first_rank(topology, lambda: check_profile_folder(profile))
    if output is not None:
        check_beside(output, config, (prompts_file, config.generation.calibration))
        on_first_rank(topology, lambda: check_output(output, overwrite))
    with owned_output(output, topology):
        code = _generate(
            config,
            topology,
            prompts,
            prompts_file,
            output,
            overwrite=overwrite,
            as_json=as_json,
            show_exits=show_exits,
            profile=profile,
        )
    destroy_parallel()
    return code


def _generate(
    config: Config,
    topology: Topology,
    prompts: list[str],
    prompts_file: Path | None,
    output: Path | None,
    *,
    overwrite: bool,
    as_json: bool,
    show_exits: bool,
    profile: Path | None,
) -> int:
    # All ranks share one standard input, and a pipe of prompts can be read only once, so rank 0 reads them.
    prompts, lines = on_first_rank(topology, lambda: _read(prompts, prompts_file))
    before = None
    if output is not None and config.generation.budget is not None and not overwrite:
        before = on_first_rank(topology, lambda: budget_exit_in(output))
    llm = EarlyExitLLM.from_config(config, topology, before)
    options, requests = requests_of(llm, prompts, lines)
    num_failed = 0
    with time_report(profile, topology, {}):
        if output is None and not as_json and prompts_file is None:
            jobs = [request.job for request in requests if request.job is not None]
            completions = _show_text(llm, jobs, options, show_exits)
        else:
            completions, num_failed = deliver(llm, config, requests, options, output, overwrite)
    if num_failed and topology.is_logging_rank:
        say(
            f"ee-tuning: {num_failed} of {len(requests)} prompts could not be done; "
            f"{'their records' if output is None else output} tell{'' if output is None else 's'} why"
        )
    if topology.is_logging_rank and completions and not as_json:
        _print_summary(llm, completions, colours_of(llm) if show_exits else {})
    return 2 if num_failed or any(c.error for c in completions) else 0


def colours_of(llm: EarlyExitLLM) -> dict[int, str]:
    """Returns a colour for each early exit."""
    return exit_colours([layer for layer in llm.exit_layers if layer < llm.num_layers])


def exit_colours(early: list[int]) -> dict[int, str]:
    """Returns a colour for each of these layers, shallow to deep."""
    return {layer: EXIT_COLOURS[i * len(EXIT_COLOURS) // max(len(early), 1)] for i, layer in enumerate(early)}


def _read(prompts: list[str], file: Path | None) -> tuple[list[str], list[Line]]:
    if "-" in prompts:
        text = _read_standard_input()
        prompts = [text if prompt == "-" else prompt for prompt in prompts]
    return prompts, read_prompts(file) if file is not None else []


def _read_standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(
            f"a prompt must be UTF-8 text, but standard input is not: {error}; convert it first"
        ) from error
    except OSError as error:
        raise InputError(
            f"--prompt - reads standard input, which can not be read: {error.strerror}; give --prompt TEXT"
        ) from error


Parts = dict[int, list[tuple[str, int]]]
"""Number of a completion -> its pieces of text with the layers at which they left."""


def _show_text(llm: EarlyExitLLM, jobs: list[Job], options: GenerationSection, show_exits: bool) -> list[Completion]:
    """Prints completions: a single one while it is generated, several one after the other. A pipe gets only
    their text.
    """
    topology = llm.model.topology
    out = Console(highlight=False, soft_wrap=True, quiet=not topology.is_logging_rank)
    colours = colours_of(llm) if show_exits else {}

    def show(text: str, style: str = "") -> None:
        if not topology.is_logging_rank:
            return
        if out.is_terminal:
            out.print(Text(text, style=style), end="")
        elif style != "dim":
            sys.stdout.write(text)  # rich would turn tabs into spaces
        sys.stdout.flush()

    if len(jobs) == 1 and jobs[0].params.n == 1:  # every replica completes it
        completions: list[Completion] = []
        show(jobs[0].prompt, "dim")
        for token in llm.run(jobs, completions, options):
            show(token.text, colours.get(token.exit_layer, ""))
        show("\n")
        return completions
    made = over_replicas(jobs, lambda share: _made_of(llm, share, options), topology)
    for job, (_, parts) in zip(jobs, made, strict=True):
        for _, pieces in sorted(parts.items()):
            show(job.prompt, "dim")
            for text, layer in pieces:
                show(text, colours.get(layer, ""))
            show("\n")
    return [completion for of_job, _ in made for completion in of_job]


def _made_of(llm: EarlyExitLLM, jobs: list[Job], options: GenerationSection) -> list[tuple[list[Completion], Parts]]:
    """Returns the completions of each job, and their text in pieces."""
    made: list[tuple[list[Completion], Parts]] = [([], {}) for _ in jobs]
    completions: list[Completion] = []
    for token in llm.run(jobs, completions, options):
        made[token.index][1].setdefault(token.completion, []).append((token.text, token.exit_layer))
    for completion in completions:
        made[completion.prompt_index][0].append(completion)
    return made


def _print_summary(llm: EarlyExitLLM, completions: list[Completion], colours: dict[int, str]) -> None:
    # On stderr, so that a pipe gets only the completion.
    console = Console(stderr=True, highlight=False)
    completions = [completion for completion in completions if not completion.error]
    layers = [layer for c in completions for layer in c.exit_layers]
    if not layers:
        return
    seconds = max(c.seconds for c in completions)
    histogram = Counter(layers)
    first = min(c.statistics.seconds_to_first_token for c in completions)
    summary = Text(
        f"{len(layers)} tokens in {seconds:.2f} s, {len(layers) / seconds:.1f} tokens/s, the first after {first:.2f} s; "
        f"mean depth {sum(layers) / len(layers):.1f} of {llm.num_layers} layers; left at "
    )
    for i, layer in enumerate(sorted(histogram)):
        name = "the end" if layer == llm.num_layers else f"layer {layer}"
        summary.append(", " if i else "").append(f"{name}: {histogram[layer]}", style=colours.get(layer, ""))
    caught_up, drafted = (
        sum(getattr(c.statistics, name) for c in completions) for name in ("num_catch_up", "num_drafted")
    )
    if drafted:
        accepted = sum(c.statistics.num_accepted for c in completions)
        summary.append(f"; {drafted} drafted, {accepted / drafted:.0%} accepted")
    elif caught_up:
        summary.append(f"; {caught_up} taken deeper later")
    if reused := sum(c.statistics.num_reused for c in completions):
        summary.append(f"; {reused} tokens of prompts were known from others")
    num_replicas = llm.model.topology.dp
    of_each = f" on each of {num_replicas} replicas" if num_replicas > 1 else ""
    if llm.engine is not None:
        summary.append(
            f"; {llm.engine.seconds_in_heads / seconds:.0%} of the time in heads; "
            f"KV cache {llm.engine.cache.num_bytes / 1e6:.1f} MB{of_each}"
        )
    console.print(summary, soft_wrap=True)
