"""The texts of a comparison: what heads are tuned on, what layers are chosen by, and what everything is measured on.

Held-out samples are written as two tasks of `ee-tuning evaluate`, as text, so that each model reads the same: one whose
metric is the perplexity of a sample after its beginning, and one whose beginnings are continued, for the speed.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_tuning.config import Config, DataSection
from ee_tuning.data.documents import file_ranges, read_records
from ee_tuning.data.file_kind import kind_of
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.data.loader import VALIDATION_SEED
from ee_tuning.data.sources import find_corpora
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_of
from ee_tuning.data.tokens import Samples
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.atomic_write import scratch_folder

LOSS_TASK, SPEED_TASK = "held_out", "continued"
"""Names of the tasks."""
FOLDER, SETTINGS = "text", "settings.json"
_PIECES, _PIECE = 64, 4_000
"""A lone text is cut into this many documents, or more of so many characters."""
_BEGINNING = 8
"""The share of a sample that is given, as a divisor: the other 7/8 are predicted."""
_PROMPT_TOKENS, _CHOOSING_TOKENS = 48, 9_000
"""Tokens of a prompt that is continued; and of the text by which layers are chosen."""


@dataclass(frozen=True)
class Texts:
    """Files of a comparison's texts."""

    folder: Path
    data: DataSection
    """What to tune on."""

    @property
    def held_out(self) -> Path:
        """The task of the loss."""
        return self.folder / f"{LOSS_TASK}.jsonl"

    @property
    def continued(self) -> Path:
        """The task of the speed."""
        return self.folder / f"{SPEED_TASK}.jsonl"

    @property
    def choosing(self) -> Path:
        """Training text by which `prune` chooses layers."""
        return self.folder / "choosing.jsonl"


def texts_of(
    config: Config, shape: ModelConfig, output: Path, num_samples: int, num_prompts: int, settings: dict[str, Any]
) -> Texts:
    """Returns the texts in `output`. Where they are not there, they are written together with the job's settings.

    Raises InputError where the data can not be used; nothing is left behind then.
    """
    folder = output / FOLDER
    is_lone = _is_lone_text(config.data)
    paths = (str(folder / "documents.jsonl"),) if is_lone else config.data.paths
    texts = Texts(folder, dataclasses.replace(config.data, paths=paths))
    if folder.is_dir():
        return texts
    with scratch_folder(folder) as scratch:
        data = config.data
        if is_lone:
            _write(scratch / "documents.jsonl", ({"text": piece} for piece in _pieces(Path(data.paths[0]))))
            data = dataclasses.replace(data, paths=(str(scratch / "documents.jsonl"),))
        _write_samples(config, shape, Texts(scratch, data), num_samples, num_prompts)
        (scratch / SETTINGS).write_text(to_json(settings, indent=1) + "\n", encoding="utf-8")
        scratch.rename(folder)
        scratch.mkdir()  # which the block's end removes
    return texts


def _write_samples(config: Config, shape: ModelConfig, texts: Texts, num_samples: int, num_prompts: int) -> None:
    tokenizer = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
    positions = shape.max_position_embeddings
    shown_as = None if texts.data == config.data else config.data.paths[0]  # a user knows the text, not its documents
    splits = load_job_samples(config, shape, data=texts.data, shown_as=shown_as, needs_validation=True)
    assert splits.valid is not None

    def text(ids: Any) -> str:
        said = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return said.strip("\ufffd")  # a character that the sample cuts

    # The tokenizer may cut the text into a few more tokens than it was made from.
    longest = min(config.tuning.seq_length, positions - 16)
    held_out = [text(ids[:longest]) for ids in _drawn(splits.valid, max(num_samples, num_prompts))]
    tasks = [task for task in map(_cut, held_out) if task is not None]
    if len(tasks) < 2:
        raise InputError(
            f"compare needs at least 2 held-out samples of {config.tuning.seq_length} tokens with words in them, got "
            f"{len(tasks)}; give more --data, a larger data.valid_fraction, or a shorter --seq-length"
        )
    _write(texts.held_out, tasks[:num_samples])
    num_given = min(_PROMPT_TOKENS, longest // 2)
    room = positions - num_given - 16
    begun = [text(ids[:num_given]) for ids in _drawn(splits.valid, num_prompts)]
    new = min(config.generation.max_new_tokens, room)
    _write(texts.continued, ({"prompt": each, "answer": "-", "max_new_tokens": new} for each in begun if each.strip()))
    count = -(-_CHOOSING_TOKENS // config.tuning.seq_length)
    _write(texts.choosing, ({"text": text(ids)} for ids in _drawn(splits.train, count)))


def _drawn(samples: Samples, count: int) -> Iterator[Any]:
    """Yields the token ids of `count` samples, or of all."""
    order = samples.order(VALIDATION_SEED)
    for place in range(min(count, order.num_distinct)):
        yield samples.sample(order.sample_at(place)).tokens


def _cut(text: str) -> dict[str, str] | None:
    """Cuts a text before a word, or anywhere where it has no blanks. None where too little is left."""
    at = len(text) // _BEGINNING
    blank = text.find(" ", at, 2 * at)
    at = blank if blank > 0 else at
    return {"prompt": text[:at], "answer": text[at:]} if text[:at].strip() and text[at:].strip() else None


def _is_lone_text(data: DataSection) -> bool:
    """Whether all data are one plain text, of which no document could be held out."""
    if data.valid_paths:
        return False
    corpora = find_corpora(data.paths, "data.paths", data.text_key)
    files = [path for corpus in corpora for path in corpus.texts]
    has_tokens = any(corpus.prefixes for corpus in corpora)
    return len(files) == 1 and not has_tokens and data.paths == (str(files[0]),) and kind_of(files[0]).format == "text"


def _pieces(path: Path) -> Iterator[str]:
    """Cuts a text at ends of lines into documents."""
    ((record, _),) = read_records(file_ranges([path])[0], "text")
    text = str(record["text"])
    size, piece = max(1, min(_PIECE, len(text) // _PIECES)), ""
    for line in text.split("\n"):
        piece += line + "\n"
        if len(piece) >= size:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def _write(path: Path, lines: Any) -> None:
    path.write_text("".join(to_json(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
