"""Prompts of Python code that neither the shipped model nor its exits were trained on, for the other benchmarks
here.
"""

import random

from ee_tuning.data.sample_corpus import sample_corpus


def held_out_prompts(count: int, size: int, seed: int = 0) -> list[str]:
    """Returns pieces of `size` ASCII characters, each ending behind the name of a function to be defined; the same ones
    every time.
    """
    prompts = []
    for _, source in sorted(sample_corpus()[1].items()):
        text, at = source.decode(errors="replace"), size
        while (at := text.find("def ", at)) >= 0 and (end := text.find("(", at)) >= 0:
            if text[end - size : end].isascii():
                prompts.append(text[end - size : end])
            at = end
    chosen = random.Random(seed).sample(prompts, len(prompts))
    assert len(chosen) >= count, f"the standard library here holds out {len(chosen)} functions, not {count}"
    return chosen[:count]
