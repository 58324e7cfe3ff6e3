"""Turns documents into token ids: the work of one process on one range of a file."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ee_tuning.data.chat import ASSISTANT, ChatFormat, Marked
from ee_tuning.data.chat_template import read_chat_template
from ee_tuning.data.documents import FileRange, read_documents
from ee_tuning.data.records import Completion, Conversation, Document, LeftOut
from ee_tuning.data.tally import LeftOutCount
from ee_tuning.data.tokenizer import (
    beginning_ids,
    begun,
    end_of_text_id,
    load_tokenizer,
    tokenizer_digests,
    tokenizer_folder,
)
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tokenizer's results, as Python lists, take some hundred bytes per token.
BATCH_CHARACTERS = 1_000_000
_SMALL_VOCABULARY = 65_500  # as in Megatron-core: below it, ids take 16 bits


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All inputs of token ids beside the text."""

    tokenizer: str
    """Folder of the tokenizer."""
    tokenizer_files: tuple[tuple[str, str], ...]
    """Name and sha256 of each file."""
    text_key: str
    chat_template: str | None
    """Text of the template; None for the tokenizer's own."""
    trusts_code: bool = False
    """Whether Python files in the tokenizer's folder are run."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of documents, each with the tokenizer's beginning tokens and closed by the end-of-text token."""

    ids: NDArray[np.int32]  # [n]
    lengths: NDArray[np.int64]  # [documents], end of text included
    hashes: NDArray[np.float64]  # [documents], see document_hash
    counts: NDArray[np.uint8] | None
    """[n]: 1 where a token counts as a label; None where all do."""
    left_out: LeftOutCount = field(default_factory=LeftOutCount)


def tokenize_range(piece: FileRange, recipe: Recipe) -> Tokens:
    """Tokenizes the documents in `piece`, without those that teach nothing.

    Raises InputError on an unusable document or tokenizer.
    """
    left_out = LeftOutCount()
    parts = [
        _encode(batch, recipe, left_out) for batch in _batched(_kept(read_documents(piece, recipe.text_key), left_out))
    ]
    return joined(parts, left_out)


def _kept(records: Iterable[Document | LeftOut], left_out: LeftOutCount) -> Iterator[Document]:
    for record in records:
        if isinstance(record, LeftOut):
            left_out.add(record)
        else:
            yield record


def joined(parts: list[Tokens], left_out: LeftOutCount) -> Tokens:
    """Concatenates `parts`."""

    def all_of(name: str, dtype: type[np.generic]) -> NDArray:
        return np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)]).astype(dtype, copy=False)

    counts = None
    if any(part.counts is not None for part in parts):
        counts = np.concatenate(
            [np.ones(len(part.ids), np.uint8) if part.counts is None else part.counts for part in parts]
        )
    return Tokens(all_of("ids", np.int32), all_of("lengths", np.int64), all_of("hashes", np.float64), counts, left_out)


def document_hash(document: Document) -> float:
    """Returns a number in [0, 1] that depends on the content only: the same on every machine, under every file name."""
    if isinstance(document, Completion) and document.as_chat:
        document = document.as_chat
    if isinstance(document, Conversation):  # .parquet has values that JSON lacks, such as times
        text = to_json(document.messages, sort_keys=True, default=str)
    else:
        text = document if isinstance(document, str) else document.prompt + document.completion
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def id_type(recipe: Recipe) -> type[np.unsignedinteger] | type[np.signedinteger]:
    """Returns the dtype of stored token ids, chosen as in Megatron-core."""
    largest = max(_tools(recipe)[0].get_vocab().values(), default=0)
    return np.uint16 if largest < _SMALL_VOCABULARY else np.int32


@functools.lru_cache(maxsize=1)
def _tools(recipe: Recipe) -> tuple:
    """Returns tokenizer, chat format, beginning ids and end-of-text id, cached per process."""
    tokenizer = load_tokenizer(recipe.tokenizer, trusts_code=recipe.trusts_code)
    return tokenizer, ChatFormat(tokenizer, recipe.chat_template), beginning_ids(tokenizer), end_of_text_id(tokenizer)


def _encode(documents: list[Document], recipe: Recipe, left_out: LeftOutCount) -> Tokens:
    tokenizer, _, beginning, end = _tools(recipe)
    texts = [document for document in documents if isinstance(document, str)]
    encoded = iter(
        tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        if texts
        else []
    )
    ids: list[int] = []
    counts: list[bool] = []
    lengths: list[int] = []
    hashes: list[float] = []
    for document in documents:
        made = (
            [_whole(begun(next(encoded), beginning), end)]
            if isinstance(document, str)
            else _encode_marked(document, recipe)
        )
        if not made and not isinstance(document, str):
            left_out.add(LeftOut("chat without a word of the assistant's to learn", document.where))
        for words, marks in made:
            ids += words
            counts += marks
            lengths.append(len(words))
        # All texts of a conversation are trained on, or held out, together.
        hashes += [document_hash(document)] * len(made)
    return Tokens(
        np.array(ids, np.int32),
        np.array(lengths, np.int64),
        np.array(hashes, np.float64),
        np.array(counts, np.uint8) if len(texts) < len(documents) else None,
    )


def _whole(text: list[int], end: int) -> Marked:
    return [*text, end], [True] * (len(text) + 1)


def _encode_marked(document: Conversation | Completion, recipe: Recipe) -> list[Marked]:
    """Returns the token ids of each text of a document, closed by end of text, and which of them are labels. May return
    no text.
    """
    tokenizer, chat, beginning, end = _tools(recipe)
    has_template = recipe.chat_template is not None or bool(tokenizer.chat_template)
    if isinstance(document, Completion) and not (document.as_chat and has_template):
        words, marks = _encode_completion(document, tokenizer)
        whole = begun(words, beginning)
        return [([*whole, end], [*[False] * (len(whole) - len(words)), *marks, not document.is_cut])]
    conversation = document.as_chat if isinstance(document, Completion) else document
    assert conversation is not None
    if not _holds_words(conversation):
        return []
    made = []
    for words, marks in _encode_chat(conversation, chat):
        if words[-1:] != [end]:
            # A last assistant turn without an end-of-turn token is closed by end of text.
            is_open = marks[-1:] == [True] and words[-1] not in tokenizer.added_tokens_decoder
            words, marks = [*words, end], [*marks, is_open and not conversation.is_cut]
        if any(marks):
            made.append((words, marks))
    return made


def _holds_words(chat: Conversation) -> bool:
    """Whether the assistant says, thinks or calls anything to be learned. A bare end of turn does not count."""
    said = [message for message in chat.messages[chat.num_given :] if message["role"] == ASSISTANT]
    # role and content are always present
    return any(message["content"].strip() or len(message) > 2 for message in said)


def _encode_chat(conversation: Conversation, chat: ChatFormat) -> list[Marked]:
    made = chat.encode(conversation)
    given = conversation.messages[: conversation.num_given]
    if any(message["role"] == ASSISTANT for message in given):  # the assistant's words in the prompt are not learned
        num_given = sum(
            sum(marks) for _, marks in chat.encode(Conversation(given, conversation.tools, conversation.where))
        )
        places = [(marks, place) for _, marks in made for place, is_marked in enumerate(marks) if is_marked]
        for marks, place in places[:num_given]:
            marks[place] = False
    return made


def _encode_completion(document: Completion, tokenizer: "PreTrainedTokenizerBase") -> Marked:
    """Tokenizes prompt and completion as one text. Tokens that end in the completion are labels."""
    if not tokenizer.is_fast:
        raise InputError(
            "prompts with completions need a fast tokenizer (tokenizer.json), which maps tokens to characters, and "
            f"the one in {tokenizer.name_or_path} is slow; convert it, or give texts"
        )
    encoded = tokenizer(
        document.prompt + document.completion,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"], [stop > len(document.prompt) for _, stop in encoded["offset_mapping"]]


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += _num_characters(document)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_characters(document: Document) -> int:
    if isinstance(document, Conversation):
        return sum(len(message["content"]) for message in document.messages)
    return len(document) if isinstance(document, str) else len(document.prompt) + len(document.completion)


def recipe_of(tokenizer: str | Path, text_key: str, chat_template: str | None, *, trusts_code: bool = False) -> Recipe:
    """Returns the recipe. `chat_template` is a template file. Raises InputError where it or the tokenizer's files can
    not be read.
    """
    folder = tokenizer_folder(tokenizer, trusts_code=trusts_code)
    return Recipe(
        tokenizer=str(folder),
        tokenizer_files=tuple(tokenizer_digests(folder, trusts_code=trusts_code).items()),
        text_key=text_key,
        chat_template=read_chat_template(chat_template),
        trusts_code=trusts_code,
    )
