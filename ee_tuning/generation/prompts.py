"""Prompts from a file of JSON lines: a prompt, options for it, and other keys, which its record keeps."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from ee_tuning.config import GenerationSection
from ee_tuning.data.json_lines import read_json_lines
from ee_tuning.errors import InputError
from ee_tuning.generation.llm import EarlyExitLLM, Job
from ee_tuning.generation.options import params_of, with_options
from ee_tuning.generation.record import RECORD_KEYS

Line = dict[str, Any]
"""`prompt`; keys of the `generation` section, `logit_bias` and `structured_output` for it; other keys, which its record
keeps.
"""

_OPTIONS = frozenset(field.name for field in dataclasses.fields(GenerationSection)) | {
    "logit_bias",
    "structured_output",
}
_MISSPELT = 0.75
"""Similarity from which on an unknown key counts as a misspelt key of the generation section, such as treshold."""

ENGINE_KEYS = frozenset({"max_pending", "prefill_chunk", "max_batch_size", "reuse_prefixes", "cache_tokens"})
"""Keys that apply to the whole run and not to one prompt."""


def read_prompts(path: Path) -> list[Line]:
    """Returns the lines of a file. Raises InputError where it can not be read or a line is no object with a
    `prompt`.
    """
    lines = []
    for number, line in read_json_lines(path, "--prompts"):
        if not isinstance(line.get("prompt"), str):
            raise InputError(f'{path}:{number}: a line must have a text "prompt", got {line.get("prompt")!r:.60}')
        lines.append(line)
    if not lines:
        raise InputError(f"--prompts must name a file with a prompt, got {path}, which is empty")
    return lines


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt with its job."""

    prompt: str
    job: Job | None
    """None where its line is invalid."""
    error: str = ""
    """The reason where there is no job."""
    kept: Line = dataclasses.field(default_factory=dict)
    """Keys of the line that its record keeps."""

    @property
    def num_completions(self) -> int:
        """Number of its records: one where it has no job."""
        return 1 if self.job is None else max(1, self.job.params.n)


def requests_of(llm: EarlyExitLLM, prompts: list[str], lines: list[Line]) -> tuple[GenerationSection, list[Request]]:
    """Returns the options of all, and a request for each prompt, then for each line. Raises InputError on unusable
    options.
    """
    options, jobs = llm.jobs(prompts)
    params_of(options).check(llm.model.config.vocab_size)
    return options, [Request(job.prompt, job) for job in jobs] + [_request_of(llm, line) for line in lines]


def _request_of(llm: EarlyExitLLM, line: Line) -> Request:
    kept = {key: value for key, value in line.items() if key != "prompt" and key not in _OPTIONS}
    try:
        for key in kept:
            _check_kept(key)
        job = job_of(llm, {key: value for key, value in line.items() if key not in kept})
        job.params.check(llm.model.config.vocab_size)
        return Request(line["prompt"], job, kept=kept)
    except InputError as error:
        return Request(
            line["prompt"], None, str(error), {key: value for key, value in kept.items() if key not in RECORD_KEYS}
        )


def _check_kept(key: str) -> None:
    if near := difflib.get_close_matches(key, _OPTIONS, n=1, cutoff=_MISSPELT):
        raise InputError(
            f"unknown key {key}; did you mean generation.{near[0]}? A key that its record is to keep needs another name"
        )
    if key in RECORD_KEYS:
        raise InputError(
            f"a line must not have the key {key}, which its record has for the completion; give it another name"
        )


def job_of(llm: EarlyExitLLM, line: Line) -> Job:
    """Returns a line's job: its own keys, and the run's for all others. Raises InputError on a key or value that can
    not be used.
    """
    keys = {key: value for key, value in line.items() if key not in ("prompt", "logit_bias", "structured_output")}
    if misplaced := ENGINE_KEYS & keys.keys():
        raise InputError(
            f"{min(misplaced)} is of the whole run, not of a prompt; give it with --set generation.{min(misplaced)}=…"
        )
    generation = with_options(llm.defaults, keys)
    biases = line.get("logit_bias", {})
    try:
        bias = {int(token): float(value) for token, value in biases.items()}
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"logit_bias must be an object of token ids and numbers, got {biases!r:.60}") from error
    form = line.get("structured_output")
    params = dataclasses.replace(params_of(generation), logit_bias=bias, structured_output=form)
    return Job(line["prompt"], params, llm.policy(generation))
