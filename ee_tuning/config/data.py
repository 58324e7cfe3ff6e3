"""Section `data`: the texts."""

from dataclasses import dataclass, field

from ee_tuning.config.paths import PATH


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The texts that heads are tuned on."""

    paths: tuple[str, ...] = field(default=(), metadata=PATH)
    """Text files; .jsonl, .json, .csv and .parquet files of records (a text, a chat, or a prompt with its completion),
    compressed or not; prefixes of Megatron's .bin and .idx; or folders of these. For a blend, put a weight before each,
    as Megatron does: 0.3 corpus_a 0.7 corpus_b.
    """
    text_key: str = "text"
    """Key or column of the text in a record."""
    tokenizer: str | None = field(default=None, metadata=PATH)
    """Folder of the tokenizer, or org/name on the Hugging Face hub; default the model's."""
    chat_template: str | None = field(default=None, metadata=PATH)
    """File with a Jinja template for chat messages, or the name of one of the tokenizer's templates. The default is the
    tokenizer's own: of several the one named default, or tool_use for chats with tools.
    """
    valid_paths: tuple[str, ...] = field(default=(), metadata=PATH)
    """Held-out files. Without them, valid_fraction of the documents is held out."""
    valid_fraction: float = 0.05
    """Share of the documents held out for validation: of texts, chosen by a hash of the document; of .bin and .idx, the
    last ones.
    """
    split: str | None = None
    """Megatron's split of the documents of .bin and .idx into training, validation and test, for example 969,30,1. It
    replaces valid_fraction where data.paths names no texts.
    """
    reset_attention_mask: bool = False
    """Whether a token attends only to its own document, where several share a sample."""
    reset_position_ids: bool = False
    """Whether positions restart with each document in a sample."""
    eod_mask_loss: bool = False
    """Whether the first token of a document is no label, since it follows the end of another document."""
    cache: str | None = field(default=None, metadata=PATH)
    """Folder that caches token ids for later runs; default $EE_TUNING_CACHE, or .cache/ee_tuning in the home folder.
    One process per machine tokenizes, and all read the same file. Entries unused for 90 days are removed when more is
    tokenized; the folder may be emptied while no run reads it.
    """
    workers: int = 0
    """Processes that tokenize; 0 for one per CPU core. A small text is tokenized without extra processes."""
