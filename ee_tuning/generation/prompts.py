"""Prompts from a file: a JSON object a line, with wishes of its own beside the prompt."""
import dataclasses
import json
from pathlib import Path
from typing import Any

from ee_tuning.config import GenerationSection
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.llm import EarlyExitLLM, Job, params_of, with_options
from ee_tuning.line_file import read_lines

Line = dict[str, Any]
"""`prompt`, and keys of the `generation` section and `logit_bias` for this one."""

ENGINE_KEYS = frozenset({"max_pending", "prefill_chunk", "max_batch_size", "reuse_prefixes", "cache_tokens"})
"""Of the whole run, not of a prompt."""


def read_prompts(path: Path) -> list[Line]:
    """The lines of a file. Raises InputError where it can not be read or a line is no object with a `prompt`."""
    try:
        texts = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts must name a file of JSON lines, got {path}: {' '.join(str(error).split())}") from error
    lines = []
    for number, line in enumerate(texts, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InputError(f"line {number} of {path} must be a JSON object, got {line[:60]!r}: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
            raise InputError(f'line {number} of {path} must be an object with a text "prompt", got {line[:60]!r}')
        lines.append(value)
    if not lines:
        raise InputError(f"--prompts must name a file with a prompt, got {path}, which is empty")
    return lines


def jobs_of(llm: EarlyExitLLM, prompts: list[str], lines: list[Line]) -> tuple[GenerationSection, list[Job], list[Completion]]:
    """(the options of all, what is to be done, records of lines whose wishes make no sense)."""
    options, jobs = llm.jobs(prompts)
    refused = []
    for line in lines:
        try:
            jobs.append(job_of(llm, line))
        except InputError as error:
            refused.append(Completion(prompt=line["prompt"], finish_reason="error", error=str(error)))
    return options, jobs, refused


def job_of(llm: EarlyExitLLM, line: Line) -> Job:
    """A line's job: its own keys, the run's for the others. Raises InputError on a key or value that can not be used."""
    keys = {key: value for key, value in line.items() if key not in ("prompt", "logit_bias")}
    if misplaced := ENGINE_KEYS & keys.keys():
        raise InputError(f"{min(misplaced)} is of the whole run, not of a prompt; give it with --set generation.{min(misplaced)}=…")
    generation = with_options(llm.defaults, keys)
    biases = line.get("logit_bias", {})
    try:
        bias = {int(token): float(value) for token, value in biases.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"logit_bias must be an object of token ids and numbers, got {biases!r:.60}") from error
    params = dataclasses.replace(params_of(generation), logit_bias=bias)
    return Job(line["prompt"], params, llm.policy(generation))
