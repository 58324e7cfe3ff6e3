"""The tokenizer of a model that is written: a folder of its files, and its beginning and end tokens."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ee_tuning.checkpoint.gguf_file import is_gguf
from ee_tuning.config import Config, replace
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_folder


@contextmanager
def with_tokenizer_files(config: Config) -> Iterator[Config]:
    """Yields `config` with a folder of files in data.tokenizer where it names a tokenizer on the hub, or where the
    tokenizer is in a GGUF file.
    """
    trusts_code = config.model.trust_remote_code
    if config.data.tokenizer:
        folder = tokenizer_folder(config.data.tokenizer, trusts_code=trusts_code)
        config = replace(config, data={"tokenizer": str(folder)})
    tokenizer = Path(config.data.tokenizer or config.model.path)
    if not is_gguf(tokenizer):
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="ee_tuning-") as made:
        load_tokenizer(tokenizer, trusts_code=trusts_code).save_pretrained(made)
        yield replace(config, data={"tokenizer": made})


def special_tokens(config: Config) -> dict[str, int]:
    """Returns the beginning and end tokens of data.tokenizer, which a Megatron checkpoint does not contain."""
    if config.data.tokenizer is None:
        return {}
    loaded = load_tokenizer(config.data.tokenizer, trusts_code=config.model.trust_remote_code)
    return {key: token for key in ("bos_token_id", "eos_token_id") if isinstance(token := getattr(loaded, key), int)}
