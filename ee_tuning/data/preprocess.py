"""`ee-tuning preprocess`: writes texts as PREFIX.bin and PREFIX.idx for Megatron-core, and PREFIX.mask for chats."""

from dataclasses import replace
from pathlib import Path

from ee_tuning.config import DataSection
from ee_tuning.data.encoding import recipe_of
from ee_tuning.data.indexed import BIN_SUFFIX, INDEX_SUFFIX, MASK_SUFFIX, with_suffix
from ee_tuning.data.piped import as_given, copied, has_pipes
from ee_tuning.data.sources import Corpus, find_corpora
from ee_tuning.data.tally import nothing_to_learn, print_counts, print_passed_over
from ee_tuning.data.tokenizing import Tokenized, TokenizedRange, check_workers, tokenize_files
from ee_tuning.errors import InputError
from ee_tuning.progress import ByteProgress
from ee_tuning.storage.apart import check_apart
from ee_tuning.storage.atomic_write import move_into_place, scratch_folder
from ee_tuning.storage.owner import owned

_IN_ORDER = (MASK_SUFFIX, BIN_SUFFIX, INDEX_SUFFIX)
"""The index comes last: without it, the others are no dataset."""


def preprocess(data: DataSection, output: Path, overwrite: bool, *, trusts_code: bool = False) -> TokenizedRange:
    """Tokenizes the files of data.paths into the prefix `output`, in their order, with an end-of-text token per
    document.

    The tokenizer's own Python files run if `trusts_code`. Raises InputError where an input can not be used, or `output`
    exists already; nothing is left behind then.
    """
    if data.tokenizer is None:
        raise InputError("data.tokenizer must name a tokenizer's folder, got none; give --tokenizer FOLDER")
    if output.name in ("", ".."):
        raise InputError(
            f"--output is the prefix of {BIN_SUFFIX} and {INDEX_SUFFIX}, got the folder {output}; give {output / 'corpus'}"
        )
    if output.suffix in _IN_ORDER:
        raise InputError(
            f"--output is the prefix of {BIN_SUFFIX} and {INDEX_SUFFIX}, got {output}; give {output.with_suffix('')}"
        )
    check_workers(data.workers)
    there = [path for suffix in _IN_ORDER if (path := with_suffix(output, suffix)).exists()]
    if there and not overwrite:
        raise InputError(f"{there[0]} exists already; give --overwrite to replace it, or another --output")
    check_apart(output, (*data.paths, data.tokenizer))
    if not has_pipes(data.paths):
        return _preprocess(data, output, trusts_code)
    with scratch_folder(output) as folder:
        try:
            return _preprocess(replace(data, paths=copied(data.paths, folder)), output, trusts_code)
        except InputError as error:  # the copies are removed with the folder
            raise InputError(as_given(str(error))) from error


def _preprocess(data: DataSection, output: Path, trusts_code: bool) -> TokenizedRange:
    assert data.tokenizer is not None
    corpora = find_corpora(data.paths, "data.paths", data.text_key)
    files = [path for corpus in corpora for path in _texts(corpus)]
    print_passed_over([name for corpus in corpora for name in corpus.passed_over])
    recipe = recipe_of(data.tokenizer, data.text_key, data.chat_template, trusts_code=trusts_code)
    with owned(output, None), scratch_folder(output) as folder, ByteProgress("tokenizing", is_shown=True) as progress:
        steps = tokenize_files(files, recipe, folder, [folder / output.name], 0.0, data.workers, progress)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                tokenized: Tokenized = end.value
                break
        written = tokenized.outputs[0]
        if not written.num_documents:
            raise InputError(nothing_to_learn("data.paths", ", ".join(data.paths), tokenized.files))
        for suffix in reversed(_IN_ORDER):
            with_suffix(output, suffix).unlink(missing_ok=True)
        for suffix in _IN_ORDER:
            if (made := with_suffix(folder / output.name, suffix)).exists():
                move_into_place(made, with_suffix(output, suffix))
    print_counts(tokenized.files)
    return written


def _texts(corpus: Corpus) -> tuple[Path, ...]:
    if corpus.weight is not None:
        raise InputError(
            f"preprocess takes no weights, got {corpus.weight:g} for {corpus.name}; preprocess each corpus by itself, and "
            "give the weights to tune"
        )
    if corpus.prefixes:
        raise InputError(
            f"preprocess takes texts, and {with_suffix(corpus.prefixes[0], BIN_SUFFIX)} holds token ids already; leave it out"
        )
    return corpus.texts
