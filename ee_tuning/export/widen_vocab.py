"""`convert --widen`: makes the shortlist of an artifact longer, for texts whose tokens it lacks.

Heads and listed rows of output matrices are copied byte for byte. Rows of tokens that join are those that `convert`
gives new heads, the model's, taken through the linear map that took the model's to the listed rows: a fit that was
folded into them, and what tuning did to all of them alike.
"""

# n tokens of the old list · c rows of an output matrix, of the longer list and, but for a drafting head, of any other
# token · h hidden
import dataclasses
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ee_tuning.artifact.convert import check_output_vocab, print_summary
from ee_tuning.artifact.exit_config import ExitHeadsConfig
from ee_tuning.artifact.exit_heads import ExitHeadsReader, check_bound_to, check_output, write_exit_heads
from ee_tuning.artifact.exit_init import InitialExits
from ee_tuning.artifact.exit_vocab import read_id_list
from ee_tuning.artifact.shapes import with_seq_length
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import BackboneSource, check_model, open_model
from ee_tuning.config import Config, replace
from ee_tuning.data.frequent_tokens import list_tokens
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.errors import InputError
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.model.fit import RIDGE
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel
from ee_tuning.storage.apart import check_apart
from ee_tuning.storage.owner import owned
from ee_tuning.storage.tensor_blocks import tensor_blocks
from ee_tuning.tuning.settings import check_settings


def widen_vocab(
    config: Config, exits: Path, output: Path, token_ids: Path | None = None, *, overwrite: bool = False
) -> None:
    """Writes the artifact `exits` to `output` with a longer shortlist, and prints a summary and the next command.

    The tokens of the JSON file `token_ids` join the list, or else the most frequent ones of data.paths, until it has
    exits.output_vocab tokens. Runs in any number of processes. Raises InputError where the artifact has no list or is
    another model's, the list would not grow, or the texts, the file or `output` can not be used; nothing is left
    behind then.
    """
    check_apart(output, (config.model.path, config.data.tokenizer, exits))
    reader, model, _ = open_model(config.model)
    with reader, ExitHeadsReader(exits, verifies=config.exits.verify) as base:
        reader.check_complete(model)
        check_bound_to(base, fingerprint(reader, model))
        base.check_complete(model)
        _check_grows(config, base, model, token_ids)
        topology = init_parallel(config.parallel)
        with owned(output, topology):
            on_first_rank(topology, lambda: check_output(output, overwrite))
            check_model(reader, model, topology, verifies=config.exits.verify)
            listed = _listed(config, base, model, token_ids, topology)
            wider = dataclasses.replace(
                base.config,
                output_vocab={**listed.record, "widened_from": len(base.config.token_ids)},
                token_ids=listed.token_ids,
            )
            heads = _WiderHeads(base, wider, reader, model)
            write_exit_heads(output, wider, model, heads.blocks, topology, overwrite=overwrite)
    if topology.is_logging_rank:
        print_summary(config, wider, output)
    destroy_parallel()


def _check_grows(config: Config, base: ExitHeadsReader, model: ModelConfig, token_ids: Path | None) -> None:
    """Raises InputError where the heads have no list, or the job asks for no longer one. Reads no texts."""
    held, size = len(base.config.token_ids), config.exits.output_vocab
    if not held:
        raise InputError(
            f"--widen makes a shortlist longer, and {base.folder} has none: its heads say the whole vocabulary; leave "
            "--widen out"
        )
    if token_ids is not None:
        return
    if not size:
        raise InputError(f"--widen needs the new size of the list, which has {held} tokens; give --output-vocab N")
    check_output_vocab(dataclasses.replace(config.exits, output="untied"), model.vocab_size)
    if isinstance(size, int) and size <= held:
        raise InputError(
            f"exits.output_vocab must be more than the {held} tokens that {base.folder} lists, all of which stay, got {size}; "
            "give more"
        )
    if not config.data.paths:
        raise InputError(
            "--widen lists the most frequent tokens of texts, and data.paths names none; give --data PATH, or --token-ids FILE"
        )


def _listed(
    config: Config, base: ExitHeadsReader, model: ModelConfig, token_ids: Path | None, topology: Topology
) -> ListedTokens:
    """Returns the longer list. All ranks call it."""
    held = base.config.token_ids
    if token_ids is not None:
        return on_first_rank(topology, lambda: _joined_list(token_ids, held, base, model.vocab_size))
    own = {"exit_layers": base.config.exit_layers, "architecture": base.config.architecture, "output": "untied"}
    job = replace(with_seq_length(config, model), exits=own, tuning={"eval_iters": 0})
    check_settings(job.tuning)
    listed = list_tokens(job, model, load_job_samples(job, model, topology).train, topology, held)
    if listed is None:
        raise InputError(
            f"exits.output_vocab = auto finds all {model.vocab_size} tokens best, and --widen writes a list; give a number"
        )
    return listed


def _joined_list(path: Path, held: Collection[int], base: ExitHeadsReader, vocab_size: int) -> ListedTokens:
    """Returns the list that the tokens of the file join."""
    ids = read_id_list(path, "give --token-ids a JSON list of token ids, or an exit_vocab.json")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(f"{path} must hold ids of the model's vocabulary of {vocab_size}, got {token}")
    joined = sorted({*held, *ids})
    if not len(held) < len(joined) < vocab_size:
        raise InputError(
            f"{path} must hold tokens that {base.folder} does not list, but not all of them: it lists {len(held)}, and "
            f"would list {len(joined)} of {vocab_size}"
        )
    return ListedTokens(token_ids=tuple(joined), num_tokens=0, num_listed=0)


class _WiderHeads:
    """The tensors of the artifact with the longer list."""

    def __init__(self, base: ExitHeadsReader, wider: ExitHeadsConfig, reader: BackboneSource, model: ModelConfig):
        self._base, self._num_held = base, len(base.config.token_ids)
        self._copied = InitialExits(dataclasses.replace(wider, init="copy"), reader, model)
        self._held = torch.searchsorted(torch.tensor(wider.token_ids), torch.tensor(base.config.token_ids))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yields the rows of a whole tensor, block by block."""
        if not name.endswith(".output.weight"):
            yield from tensor_blocks(self._base, name)
            return
        yield from self._output(name).split(4096)

    def _output(self, name: str) -> Tensor:  # [c, h], of the artifact's dtype
        own = self._base.full(name)
        rows = _mapped(self._model_rows, self._held, own[: self._num_held])
        rows[self._held] = own[: self._num_held]
        if self._base.config.draft is None:  # what stands for any other token is nearly as it was, and tuned
            rows[-1] = own[-1]
        return rows

    @cached_property
    def _model_rows(self) -> Tensor:  # [c, h]
        """The rows that a copied head would begin with, the same for all exits."""
        return self._copied.full(f"exits.{self._base.config.exit_layers[0]}.output.weight")


def _mapped(rows: Tensor, held: Tensor, own: Tensor) -> Tensor:  # [c, h], [n], [n, h] -> [c, h]
    """Returns rows W + W D with D of the listed rows alone: argmin ‖W D − (own − W)‖² + λ ‖D‖². Of untuned copies D is
    0, and new rows are the model's to the bit.
    """
    listed = rows[held].double()
    gram = listed.T @ listed
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    change = torch.linalg.solve(gram, listed.T @ (own.double() - listed))
    return (rows.double() + rows.double() @ change).to(rows.dtype)
