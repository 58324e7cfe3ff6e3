"""Inputs and outputs of `ee-tuning calibrate --guarantee`. `guarantee.py` runs the tests.

Documents are the units, because units must be independent: the tokens of a document are not, and neither are samples
cut from one.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from shlex import quote

from ee_tuning.artifact.load import LoadedModel
from ee_tuning.calibration.calibrate import MEASURES, CalibrationResult, score_thresholds
from ee_tuning.calibration.calibrate_text import SampledText, draw, read_drawn, samples_of
from ee_tuning.calibration.guarantee import (
    GRID,
    Guarantee,
    Proof,
    documents_needed,
    earliest,
    guarantee_tree,
    prove,
    remedy_text,
    try_thresholds,
)
from ee_tuning.config import Config
from ee_tuning.data.tokens import Samples
from ee_tuning.errors import InputError
from ee_tuning.evaluation.calibration_file import write_calibration

CONFIDENCE, TOKENS = 0.95, 200_000


def calibrate_with_guarantee(config: Config, flags: argparse.Namespace, loaded: LoadedModel, picture: Path) -> None:
    """Measures, writes `flags.output` and its picture, and prints a table. Raises InputError where documents are too
    few.
    """
    from ee_tuning.calibration.guarantee_picture import draw_guarantee

    asked = Guarantee(
        flags.guarantee,
        CONFIDENCE if flags.confidence is None else flags.confidence,
        MEASURES if flags.measure in (None, "best") else (flags.measure,),
    )
    samples = samples_of(config, loaded.model.config, by_document=True)
    documents = _documents(samples, TOKENS if flags.tokens is None else flags.tokens)
    _check_number(len(documents), asked, is_cut=len(documents) < samples.order(0).num_distinct)
    readings = read_drawn(loaded.model, documents)
    proofs = prove(
        {measure: try_thresholds(readings, measure) for measure in asked.measures}, asked.delta, asked.epsilon
    )
    measure = earliest(proofs)
    thresholds = {layer: proofs[measure].threshold for layer in readings.exit_layers}
    found = score_thresholds(readings, measure, thresholds)
    if not loaded.model.topology.is_logging_rank:
        return
    write_calibration(
        flags.output,
        config,
        loaded.model.config.num_layers,
        loaded.heads_digest,
        {
            "measure": measure,
            "thresholds": thresholds,
            "tokens": readings.num_tokens,
            "found": dataclasses.asdict(found),
            "guarantee": {
                **guarantee_tree(asked, proofs),
                "documents": proofs[measure].num_documents,
                "loss": "share of a document's tokens that differ from the full model's",
            },
        },
    )
    draw_guarantee(proofs, measure, asked.delta, picture)
    _print_summary(asked, measure, proofs[measure], readings.num_tokens, found, readings.num_layers)
    print(f"wrote {flags.output} and {picture}; next: ee-tuning generate --calibration {quote(str(flags.output))} …")


def _documents(samples: Samples, num_tokens: int) -> list[SampledText]:
    """Returns documents until they have `num_tokens` tokens. The choice does not depend on their content."""
    documents: list[SampledText] = []
    for document in draw(samples, range(samples.order(0).num_distinct)):
        if num_tokens <= 0:
            break
        documents.append(document)
        num_tokens -= len(document.tokens)
    return documents


def _check_number(num_documents: int, asked: Guarantee, *, is_cut: bool) -> None:
    needed, by_one = asked.num_needed, documents_needed(asked.delta, asked.epsilon)
    assert by_one is not None
    if num_documents < needed:
        remedy = (
            "raise --tokens"
            if is_cut
            else "give more --data (a text file is one document, each line of a .jsonl file another)"
        )
        fewer = f"; with only one --measure, {by_one:,} would do" if by_one < needed else ""
        raise InputError(
            f"--guarantee {asked.delta:g} with --confidence {asked.confidence:g} needs at least {needed:,} documents, even "
            f"where no exit is ever wrong, got {num_documents:,}; {remedy}{fewer}"
        )


def _print_summary(
    asked: Guarantee, measure: str, proof: Proof, num_tokens: int, found: CalibrationResult, num_layers: int
) -> None:
    print(f"{len(GRID)} thresholds tested on {proof.num_documents:,} documents, {num_tokens:,} tokens")
    if proof.threshold is None:
        print(
            f"no threshold can be guaranteed: no token will leave early. At {GRID[0]:g}, the highest, exits are wrong at "
            f"{float(proof.losses[0]):.2%} of a document's tokens (p = {float(proof.p_values[0]):.2g}, and "
            f"{proof.level:.2g} is needed); {remedy_text(asked, proof, 'documents')}"
        )
        return
    name, at = f"leaves from {measure}", proof.num_proven - 1
    print(f"exit  {name}  of those that come  agreement")
    for layer, result in found.exits.items():
        print(f"{layer:4}  {proof.threshold:{len(name)}.6f}  {result.share:18.1%}  {result.agreement:9.1%}")
    print(
        f"guaranteed: of documents like these, at most {asked.delta:.2%} of the tokens differ from the full model's, on average over "
        f"documents, with confidence {asked.confidence:g}; measured: {float(proof.losses[at]):.2%}, p = {float(proof.p_values[at]):.2g}"
    )
    if math.isclose(float(proof.depths[at]), num_layers):
        print("hardly a token leaves by it; more documents prove lower thresholds")
    else:
        print(f"{float(proof.depths[at]):.2f} of {num_layers} layers a token")
