"""Chooses the shortlist of exits: the most frequent labels of training texts, and tokens that must be listed in any
case.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ee_tuning.artifact.convert import check_output_vocab
from ee_tuning.checkpoint.formats import model_folder
from ee_tuning.config import Config
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_of
from ee_tuning.data.tokens import Samples
from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.model.partition import final_head_cost, stage_costs
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.model_config.token_ids import generation_end_token_ids
from ee_tuning.notices import warn
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology

# v vocabulary

MOST_COUNTED = 20_000_000
"""Most labels that are counted: the first ones in the order of training."""
FEWEST_AUTO = 1024
"""Smallest shortlist that `auto` chooses."""
_COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TokenCounts:
    """Number of times that each token is a label."""

    counts: NDArray[np.int64]
    """[v]."""
    required: frozenset[int]
    """Tokens that are listed in any case: special and stop tokens, and those of a list that becomes longer."""

    def ordered(self) -> NDArray[np.int64]:  # [v]
        """Returns all ids in the order of listing: required ones, then by frequency, then by id."""
        ids = np.arange(len(self.counts))
        is_required = np.isin(ids, list(self.required))
        return np.lexsort((ids, -self.counts, ~is_required))

    def listed(self, size: int) -> ListedTokens:
        """Returns the first `size` of them."""
        chosen = np.sort(self.ordered()[:size])
        return ListedTokens(
            token_ids=tuple(chosen.tolist()),
            num_tokens=int(self.counts.sum()),
            num_listed=int(self.counts[chosen].sum()),
        )


def list_tokens(
    config: Config, model: ModelConfig, samples: Samples, topology: Topology, held: Collection[int] = ()
) -> ListedTokens | None:
    """Returns the shortlist for exits.output_vocab, the same on all ranks, or None for the whole vocabulary. All ranks
    call it. The tokens `held` stay listed, however rare they are.

    Raises InputError where it would have no more than the required tokens, or the vocabulary is no larger.
    """
    if not config.exits.output_vocab:
        return None
    listed = on_first_rank(topology, lambda: _list_tokens(config, model, samples, held))
    if topology.is_logging_rank and listed is not None:
        print(
            f"exits say {len(listed.token_ids):,} tokens of the vocabulary, {listed.record['share']:.2%} of "
            f"{listed.num_tokens:,} tokens "
            f"of the training data{'' if config.exits.drafts else ', and any other'}",
            flush=True,
        )
    return listed


def _list_tokens(config: Config, model: ModelConfig, samples: Samples, held: Collection[int]) -> ListedTokens | None:
    check_output_vocab(config.exits, model.vocab_size)
    counts = np.zeros(model.vocab_size, dtype=np.int64)
    for labels in _labels(samples, config.tuning.seed):
        counts += np.bincount(labels, minlength=model.vocab_size)
    known = TokenCounts(counts, required_tokens(config, model_folder(config.model.path), model).union(held))
    if held:
        share = counts[list(held)].sum() / max(counts.sum(), 1)
        print(f"the {len(held):,} tokens that are listed are {share:.2%} of the training data", flush=True)
    size = config.exits.output_vocab
    if not isinstance(size, int):
        size = chosen_size(config, model, known)
        if size >= model.vocab_size:
            print(
                f"exits.output_vocab = auto chooses all {model.vocab_size:,} tokens: a shortlist would save too little",
                flush=True,
            )
            return None
    if size <= len(known.required):
        raise InputError(
            f"exits.output_vocab must be more than the {len(known.required)} special and stop tokens"
            f"{' and tokens of the list' if held else ''}, which are always listed, got {size}; give more"
        )
    return known.listed(size)


def chosen_size(config: Config, model: ModelConfig, known: TokenCounts) -> int:
    """Returns the size with the smallest cost: a power of two from FEWEST_AUTO on, or the vocabulary.

    The cost, in shares of a full pass, is that of asking every exit in vain plus what unlisted tokens would have saved
    at the middle exit.
    """
    layers, num_layers = config.exits.layers(model.num_layers), model.num_layers
    whole = sum(stage_costs(model, num_layers, (), 0, trains_heads=False, has_final_head=True))
    # A token that can not be drafted takes a full pass.
    saved = 1.0 if config.exits.drafts else 1 - sorted(layers)[len(layers) // 2] / num_layers
    order = known.ordered()
    covered = np.cumsum(known.counts[order]) / max(int(known.counts.sum()), 1)

    def loss(size: int) -> float:
        return len(layers) * final_head_cost(model) * size / model.vocab_size / whole + (1 - covered[size - 1]) * saved

    sizes = [1 << power for power in range(FEWEST_AUTO.bit_length() - 1, model.vocab_size.bit_length())]
    return min([*(size for size in sizes if len(known.required) < size < model.vocab_size), model.vocab_size], key=loss)


def required_tokens(config: Config, folder: Path, model: ModelConfig) -> frozenset[int]:
    """Returns stop tokens as in generation, and the tokenizer's special tokens. Without a tokenizer only the former."""
    ids = {*model.eos_token_ids, *(generation_end_token_ids(folder, model.vocab_size) or ())}
    try:
        tokenizer: Any = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
    except InputError as error:
        warn(
            f"the exits' shortlist holds no special tokens but those that end texts, for there is no tokenizer: {error}"
        )
    else:
        ids |= {
            *tokenizer.all_special_ids,
            *(token for token, each in tokenizer.added_tokens_decoder.items() if each.special),
        }
    return frozenset(token for token in ids if 0 <= token < model.vocab_size)


def _labels(samples: Samples, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yields the labels of samples in training order, until MOST_COUNTED are reached."""
    order, num_before, num_here, parts = samples.order(seed), 0, 0, list[NDArray[np.int64]]()
    for position in range(order.num_distinct):
        if num_before + num_here >= MOST_COUNTED:
            break
        sample = samples.sample(order.sample_at(position))
        parts.append(sample.tokens[1:][sample.loss_mask > 0])
        num_here += len(parts[-1])
        if num_here >= _COUNTED_AT_ONCE:
            yield np.concatenate(parts)
            num_before, num_here, parts = num_before + num_here, 0, []
    if parts:
        yield np.concatenate(parts)
