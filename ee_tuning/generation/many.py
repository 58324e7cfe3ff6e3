"""Completes many prompts: each record is delivered as soon as it is finished, and records of an earlier process are
kept.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.config import Config, GenerationSection
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.delivery import CompletionProgress, Delivery, InOrder
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.output_file import Key, OutputFile, Settings, is_standard_output, is_stream
from ee_tuning.generation.prompts import ENGINE_KEYS, Request
from ee_tuning.generation.record import as_record
from ee_tuning.generation.shared_decoding import decode_shared
from ee_tuning.interrupts import term_raises
from ee_tuning.json_file import to_json
from ee_tuning.notices import say
from ee_tuning.parallel.collectives import on_first_rank


def deliver(
    llm: EarlyExitLLM,
    config: Config,
    requests: list[Request],
    options: GenerationSection,
    output: Path | None,
    overwrites: bool,
) -> tuple[list[Completion], int]:
    """Completes the requests that have a job and delivers a record for each completion, or error: to `output`, or
    standard output.

    Returns the newly made completions, on rank 0, and the number of requests that failed, on all ranks. All ranks call
    it; rank 0 delivers the records of all replicas.
    """
    topology, counts = llm.model.topology, [request.num_completions for request in requests]
    opened: list[Delivery] = []

    def open_delivery() -> tuple[frozenset[Key] | None, int]:
        if output is None or is_stream(output):
            opened.append(InOrder(_stream(output), counts))
            return opened[0].done, 0
        settings = settings_of(llm, config, requests, options)
        file = OutputFile(output, settings, len(requests), overwrites, budget_exit=llm.budget_exit)
        opened.append(file)
        return (None if file.is_whole else file.done), file.num_errors

    done, num_errors = on_first_rank(topology, open_delivery)
    delivery = opened[0] if opened else None
    if done is None:  # on all ranks
        _tell(
            delivery,
            f"{output} has all {len(requests)} prompts of this job already: nothing is left to do; --overwrite makes it anew",
        )
        return [], num_errors
    if done:
        _tell(delivery, f"{len(done)} of {sum(counts)} completions are in {output}.partial already")
    with closed_at_the_end(delivery, sum(counts)):
        return _decode(llm, requests, options, done, delivery, CompletionProgress(sum(counts), len(done)))


def settings_of(llm: EarlyExitLLM, config: Config, requests: list[Request], options: GenerationSection) -> Settings:
    """Returns everything that the completions depend on, as plain data."""
    free = ENGINE_KEYS | {"calibration"}  # the content of a calibration is part of the requests' policies
    digest = hashlib.sha256()
    for request in requests:
        asked = None if request.job is None else dataclasses.asdict(request.job)
        digest.update((to_json([request.prompt, request.kept, asked], sort_keys=True, default=str) + "\n").encode())
    return {
        **model_settings(llm, config),
        **{name: value for name, value in dataclasses.asdict(options).items() if name not in free},
        "prompts": digest.hexdigest(),
    }


def model_settings(llm: EarlyExitLLM, config: Config) -> Settings:
    """Returns everything that completions depend on beside the requests: the model, its exits, its tokenizer."""
    return {
        "model": model_fingerprint(config),
        "exits": llm.heads_digest,
        "dtype": str(llm.model.plan.dtype).removeprefix("torch."),
        "tokenizer": config.data.tokenizer,
        "end of text": list(llm.stop_token_ids),
    }


def model_fingerprint(config: Config) -> str:
    """Returns the fingerprint of a job's model, with the weights of model.adapter."""
    reader, model, _ = open_model(config.model)
    with reader:
        return fingerprint(reader, model)


def _stream(output: Path | None) -> TextIO:
    if output is None or is_standard_output(output):
        return sys.stdout
    try:
        return output.open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output must name a file that can be written, got {output}: {error.strerror}") from error


def _decode(
    llm: EarlyExitLLM,
    requests: list[Request],
    options: GenerationSection,
    done: frozenset[Key],
    delivery: Delivery | None,
    progress: CompletionProgress,
) -> tuple[list[Completion], int]:
    """Does the work of `deliver`, except for the completions in `done`."""
    places = [
        place
        for place, request in enumerate(requests)
        if request.job is not None and not all((place, index) in done for index in range(request.num_completions))
    ]
    refused = [
        Completion(prompt=request.prompt, prompt_index=place, finish_reason="error", error=request.error)
        for place, request in enumerate(requests)
        if request.job is None
    ]
    for completion in refused:
        if delivery is not None:
            delivery.fail(as_record(completion, requests[completion.prompt_index].kept))
    completions: list[Completion] = []

    def take(number: int, completion: Completion) -> None:
        assert delivery is not None
        completion.prompt_index = places[number]
        completions.append(completion)
        record = as_record(completion, requests[completion.prompt_index].kept)
        if completion.error:
            delivery.fail(record)
        else:
            delivery.write(record)
            progress.completion()

    jobs = [job for place in places if (job := requests[place].job) is not None]
    decode_shared(llm, jobs, options, take, progress.tokens, keeps_errors=len(requests) > 1)

    def finish() -> int:
        assert delivery is not None
        delivery.finish()
        return len(refused) + sum(bool(completion.error) for completion in completions)

    return completions, on_first_rank(llm.model.topology, finish)


@contextmanager
def closed_at_the_end(delivery: Delivery | None, num_completions: int) -> Iterator[None]:
    """Closes `delivery`. If Ctrl-C or SIGTERM stops the job, prints how many completions are kept."""
    try:
        with term_raises():
            yield
    except (KeyboardInterrupt, SystemExit):
        if isinstance(delivery, OutputFile):
            say(
                f"ee-tuning: stopped; {len(delivery.done)} of {num_completions} completions are kept in {delivery.journal}: the same "
                "command, given again, goes on with them"
            )
        raise
    finally:
        if delivery is not None:
            delivery.close()


def _tell(delivery: Delivery | None, text: str) -> None:
    if delivery is not None:
        say(text)
