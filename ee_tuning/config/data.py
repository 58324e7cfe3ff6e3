"""Section `data`: the texts."""
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What the heads are tuned on."""

    paths: tuple[str, ...] = ()
    """Text files, .jsonl files (one object with a text a line), or folders of either."""
    text_key: str = "text"
    """Key of the text in a .jsonl line."""
    tokenizer: str | None = None
    """Folder of the tokenizer; default the model's."""
    valid_paths: tuple[str, ...] = ()
    """Held-out files. Without them, valid_fraction of the documents is held out."""
    valid_fraction: float = 0.05
    """Share of the documents held out for validation, chosen by a hash of the document."""
