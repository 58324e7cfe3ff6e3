"""What a comparison will do, before it does it."""

import sys

from ee_tuning.comparison.job import Comparison, step_tokens
from ee_tuning.comparison.ways import WAYS, Entry, all_steps
from ee_tuning.text_table import table_lines


def print_plan(comparison: Comparison, entries: list[tuple[str, Entry]]) -> None:
    """Prints the steps of all ways, what each reads, and which are done."""
    is_data = comparison.options.as_json and not comparison.options.dry_run
    print("\n".join(plan_lines(comparison, entries)), file=sys.stderr if is_data else sys.stdout, flush=True)


def plan_lines(comparison: Comparison, entries: list[tuple[str, Entry]]) -> list[str]:
    """Returns the lines of `print_plan`."""
    options, tuning = comparison.options, comparison.config.tuning
    ways, rates = list(dict.fromkeys(way for way, _ in entries)), rates_of(comparison)
    steps = all_steps([entry for _, entry in entries])
    depths = " and ".join(map(str, comparison.depths))
    asked, counted = options.tokens, comparison.tuning_tokens
    lines = [
        f"{comparison.model}, {comparison.shape.num_layers} layers, against {depths} of them: {len(ways)} ways, {len(steps)} steps",
        f"each tuned model reads {counted:,} tokens in {comparison.num_steps:,} steps of {tuning.global_batch_size} × "
        f"{tuning.seq_length}" + (f"; {asked - counted:,} of --tokens make no whole step" if asked > counted else ""),
        "",
        *table_lines(
            ["way", "learning rate", ""],
            [[way, f"{rates[way]:g}" if way in rates else "–", WAYS[way].summary] for way in ways],
            num_left=3,
        ),
        "",
    ]
    rows = [
        [str(number), step.title, f"{step.tokens:,}" if step.tokens else "", "done" if step.makes.exists() else ""]
        for number, step in enumerate(steps, 1)
    ]
    lines += table_lines(["step", "", "tokens", ""], rows, num_left=2)
    left = [step for step in steps if not step.makes.exists()]
    total = sum(step.tokens for step in left)
    told = f"{len(left)} steps are left, {total:,} tokens to train on and to fit to, into {comparison.folder}"
    return [*(line.rstrip() for line in lines), "", told, ""]


def rates_of(comparison: Comparison) -> dict[str, float]:
    """Returns the learning rate of each tuned way that is asked for."""
    default = {way: WAYS[way].rate for way in comparison.options.ways}
    return {way: comparison.rate(way, rate) for way, rate in default.items() if rate is not None}


def batch_text(comparison: Comparison) -> str:
    """Describes the tuning of each way in a line."""
    return (
        f"{comparison.tuning_tokens:,} tokens in {comparison.num_steps:,} steps of {step_tokens(comparison.config):,}"
    )
