"""A completion as the JSON object that `generate --json` and `--output` write."""

import math
from typing import Any

from ee_tuning.generation.completion import Completion

Record = dict[str, Any]

RECORD_KEYS = frozenset(
    {
        "prompt",
        "prompt_index",
        "index",
        "text",
        "token_ids",
        "exit_layers",
        "confidences",
        "logprobs",
        "top_logprobs",
        "tokens_per_second",
        "finish_reason",
        "statistics",
        "error",
        "job",
        "budget",
    }
)
"""Keys of the record itself. Only records in files have `job`, a digest of the job's settings, and `budget`, the exit
that it chose (see output_file.py).
"""
IMPOSSIBLE = -9999.0
"""Stands for a log-probability of minus infinity, which JSON can not express, as in OpenAI's API."""


def as_record(completion: Completion, kept: Record) -> Record:
    """Returns the record of `completion`, after the keys `kept` from its prompt's line."""
    begins = {**kept, "prompt": completion.prompt, "prompt_index": completion.prompt_index}
    if completion.error:
        return {**begins, "error": completion.error}
    told, statistics = completion, completion.statistics
    return {
        **begins,
        "index": told.index,
        "text": told.text,
        "token_ids": told.token_ids,
        "exit_layers": told.exit_layers,
        "confidences": [round(c, 6) for c in told.confidences],
        **(
            {
                "logprobs": [_said(value) for value in told.logprobs],
                "top_logprobs": [{token: _said(value) for token, value in top.items()} for top in told.top_logprobs],
            }
            if told.logprobs
            else {}
        ),
        "tokens_per_second": round(told.tokens_per_second, 2),
        "finish_reason": told.finish_reason,
        "statistics": {
            "exit_histogram": told.exit_histogram,
            "mean_depth": round(told.mean_depth, 3),
            "catch_up_tokens": statistics.num_catch_up,
            "drafted": statistics.num_drafted,
            "accepted": statistics.num_accepted,
            "reused_tokens": statistics.num_reused,
            "tokens_read_again": statistics.num_read_again,
            "seconds_waiting": round(statistics.seconds_waiting, 4),
            "seconds_to_first_token": round(statistics.seconds_to_first_token, 4),
            "seconds": round(told.seconds, 4),
        },
    }


def _said(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE
