"""A tokenizer of one token a byte, with ids in the order of the alphabet, not of the bytes."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END = 256
VOCABULARY = 257


def write_byte_tokenizer(folder: Path, *marks: str, encloses: bool = False) -> PreTrainedTokenizerFast:
    """Into `folder`; `marks` are further special tokens, from id 257 on. `encloses`: the first begins any text, end of
    text ends it.
    """
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", *marks])
    if encloses:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{marks[0]} $A <|endoftext|>", special_tokens=[(marks[0], VOCABULARY), ("<|endoftext|>", END)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", model_max_length=64)
    tokenizer.save_pretrained(folder)
    return tokenizer
