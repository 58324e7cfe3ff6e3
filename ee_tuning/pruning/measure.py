"""The effect of leaving layers out, on a text: angles between hidden states, and the loss without the layers.

Layers are streamed, and each is read once for many variants of the model: variants that have left out the same layers
so far share their states. Replicas share the samples, and take each layer at the same time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ee_tuning.config import Config
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.errors import InputError
from ee_tuning.evaluation.layer_stream import SAMPLE_LENGTH, LayerStream, angular_distances, text_ids
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.vocab import VocabShard, log_probabilities_of
from ee_tuning.progress import ProgressLines
from ee_tuning.pruning.choice import Layers

# b samples · s tokens of a sample · h hidden · v/tp this rank's rows of the vocabulary · n labels · l layers

STATE_BYTES = 4 << 30
"""Most bytes of hidden states of a pass through the model; more variants take more passes."""
_LABELS_AT_ONCE = 1024


@dataclass(frozen=True)
class HeldOutText:
    """Samples of a text."""

    tokens: Tensor
    """[b, s] int64."""
    counts: Tensor
    """[b, s - 1] bool: whether the token after each one counts as a label."""

    @property
    def num_labels(self) -> int:
        """Number of labels that count."""
        return int(self.counts.sum())

    def part(self, start: int, stop: int | None, step: int = 1) -> "HeldOutText":
        """Returns every `step`-th of the samples `start`..`stop`."""
        return HeldOutText(self.tokens[start:stop:step], self.counts[start:stop:step])


def held_out_halves(
    config: Config, model: ModelConfig, num_samples: int, topology: Topology
) -> tuple[HeldOutText, HeldOutText]:
    """Returns samples by which layers are chosen, and others for the losses: halves of data.valid_paths or, without it,
    of exits.profile_text. All ranks call it.

    Raises InputError where the text can not be used, or has too few samples for the replicas.
    """
    text = _of_data(config, model, num_samples) if config.data.valid_paths else _of_file(config, model, num_samples)
    if (found := len(text.tokens)) < 2 * topology.dp:
        raise InputError(
            f"prune needs at least {2 * topology.dp} samples of {text.tokens.shape[1]} tokens, two for each replica, got "
            f"{found}; give more text, or raise --samples"
        )
    if not text.counts[found // 2 :].any():
        raise InputError("prune needs text with words to predict, and half of the samples have none; give more --data")
    return text.part(0, found // 2), text.part(found // 2, None)


def _of_file(config: Config, model: ModelConfig, num_samples: int) -> HeldOutText:
    tokens = text_ids(config, model, num_samples)
    return HeldOutText(tokens, torch.ones_like(tokens[:, 1:], dtype=torch.bool))


def _of_data(config: Config, model: ModelConfig, num_samples: int) -> HeldOutText:
    paths = config.data.valid_paths
    data = dataclasses.replace(config.data, paths=paths, valid_paths=(), valid_fraction=0.0, split=None)
    length = min(SAMPLE_LENGTH, model.max_position_embeddings) - 1
    samples = load_job_samples(config, model, data=data, seq_length=length, needs_validation=False).train
    order = samples.order(0)
    drawn = [samples.sample(order.sample_at(place)) for place in range(min(num_samples, order.num_distinct))]
    return HeldOutText(
        torch.stack([torch.from_numpy(each.tokens) for each in drawn]),
        torch.stack([torch.from_numpy(each.loss_mask) > 0 for each in drawn]),
    )


@dataclass(frozen=True)
class Turns:
    """Turns of the hidden states by the layers."""

    distances: Tensor
    """[l + 1, l + 1] float64: the angle between the inputs of two layers at a sample's last token, over π, mean over
    samples (arXiv 2403.17887). The last row is the last layer's output.
    """
    influences: list[float]
    """Each layer's block influence: 1 − the cosine between its input and output, mean over all tokens (arXiv
    2403.03853).
    """


@torch.no_grad()
def measure_turns(stream: LayerStream, text: HeldOutText) -> Turns:
    """Runs `text` through all layers. All ranks call it."""
    topology, num_layers = stream.topology, stream.model.num_layers
    own = text.part(topology.dp_rank, None, topology.dp).tokens
    hidden = stream.embedded(own)
    last, cosines = [hidden[-1]], []
    for number in range(1, num_layers + 1):
        after = stream.layer(number)(hidden)
        cosines.append(cosine_similarity(hidden.float(), after.float(), dim=-1).double().sum())
        hidden = after
        last.append(hidden[-1])
    angles = angular_distances(last).to(topology.device) * len(own)
    sums = torch.cat([angles.flatten(), torch.stack(cosines)])
    dist.all_reduce(sums, group=topology.dp_group)
    angles, cosine = (sums / len(text.tokens)).cpu().split([angles.numel(), num_layers])
    return Turns(angles.view(num_layers + 1, -1), (1 - cosine / text.tokens.shape[1]).tolist())


def measure_losses(stream: LayerStream, text: HeldOutText, variants: Sequence[Layers]) -> dict[Layers, float]:
    """Returns the mean loss on `text`, in nats per token, of the model without the layers of each variant. All ranks
    call it.
    """
    topology = stream.topology
    own, wanted = text.part(topology.dp_rank, None, topology.dp), sorted(set(variants))
    # A layer's input and output are in memory at a time.
    state_bytes = 2 * own.tokens.numel() * stream.model.hidden_size * stream.dtype.itemsize
    step = topology.broadcast_object(max(1, STATE_BYTES // state_bytes))  # replicas may differ by one sample
    passes = [wanted[first : first + step] for first in range(0, len(wanted), step)]
    progress = _Progress(sum(_num_runs(each, stream.model.num_layers) for each in passes), topology)
    sums = torch.cat([_loss_sums(stream, own, each, progress) for each in passes])
    dist.all_reduce(sums, group=topology.dp_group)
    return dict(zip(wanted, (sums / text.num_labels).tolist(), strict=True))


class _Progress:
    """Lines about the measurement, by the first process."""

    def __init__(self, num_runs: int, topology: Topology):
        self._lines, self._done, self._total = ProgressLines(), 0, num_runs
        self._is_shown = topology.is_logging_rank

    def advance(self) -> None:
        """Counts a layer that was run."""
        self._done += 1
        if self._is_shown:
            share = self._done / self._total
            self._lines.show(f"measuring what layers are missed: {share:.0%}", self._done, self._total)


def _num_runs(variants: Sequence[Layers], num_layers: int) -> int:
    """Returns how many times a layer is run for `variants`."""
    return sum(
        len({_through(variant, number) for variant in variants if number not in variant})
        for number in range(1, num_layers + 1)
    )


@torch.no_grad()
def _loss_sums(
    stream: LayerStream, text: HeldOutText, variants: Sequence[Layers], progress: _Progress
) -> Tensor:  # [variants] float64
    states: dict[Layers, Tensor] = {(): stream.embedded(text.tokens)}  # by the layers left out so far
    for number in range(1, stream.model.num_layers + 1):
        run, reached = stream.layer(number), dict[Layers, Tensor]()
        for variant in variants:
            before, after = _through(variant, number - 1), _through(variant, number)
            if number in variant:
                reached[after] = states[before]
            elif after not in reached:
                reached[after] = run(states[before])
                progress.advance()
        states = reached
    head = stream.final_head()
    return torch.stack([_loss_sum(stream, head, states[variant], text) for variant in variants])


def _loss_sum(
    stream: LayerStream, head: Callable[[Tensor], Tensor], hidden: Tensor, text: HeldOutText
) -> Tensor:  # …, [n, h] -> [n, v/tp], [s, b, h], … -> [] float64
    model, topology = stream.model, stream.topology
    vocab = VocabShard.of(model.vocab_size, model.padded_vocab_size(topology.tp), topology)
    labels, counts = (each.T.flatten().to(hidden.device) for each in (text.tokens[:, 1:], text.counts))
    parts = zip(*(each.split(_LABELS_AT_ONCE) for each in (hidden[:-1].flatten(0, 1), labels, counts)), strict=True)
    losses = [
        -(log_probabilities_of(head(states), wanted, vocab).double() * own).sum() for states, wanted, own in parts
    ]
    return torch.stack(losses).sum()


def _through(variant: Layers, number: int) -> Layers:
    """Returns the layers that a variant has left out up to layer `number`."""
    return tuple(layer for layer in variant if layer <= number)
