"""`exits.init: fitted`: one pass over training samples, then a linear map for each exit. No gradient, no step.

The last stage sends the final normed states back to the stages with exits, like a teacher's hidden states. Each stage
sums over its replicas and tensor-parallel ranks and solves on one rank, so all ranks have the same bits. Other layouts
give the same result up to rounding.
"""

import gc
import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ee_tuning.artifact.load import LoadedModel, fitted_dtype, load_for_fitting
from ee_tuning.config import Config, TuningSection
from ee_tuning.data.loader import Batch, BatchChunk, batches_of_each
from ee_tuning.data.tokens import Samples
from ee_tuning.errors import InputError
from ee_tuning.model.exit_head import ExitInput
from ee_tuning.model.exit_spec import ListedTokens
from ee_tuning.model.fit import RIDGE, Fit, FitSums, num_columns, solved, solved_of_rank
from ee_tuning.model.sequence_chunk import KeyValueCache
from ee_tuning.notices import warn
from ee_tuning.parallel.feedback import Feedback
from ee_tuning.parallel.pinned_staging import to_device
from ee_tuning.parallel.relay import NextAction, Relay
from ee_tuning.parallel.topology import Topology
from ee_tuning.parallel.watchdog import hang_watchdog
from ee_tuning.tuning.fitting_other import OtherFit
from ee_tuning.tuning.sequence_chunks import JoinedChunks, documents_of

# s sequence, or this rank's part of it where the plan cuts it · b micro-batch · h hidden

TOKENS_PER_UNKNOWN = 100
"""Default number of tokens per unknown of a row."""
FEW_PER_UNKNOWN = 10
"""Number of tokens per unknown below which a warning is printed."""


@dataclass(frozen=True)
class FitSamples:
    """The training samples of a fit: the first ones of a run, until they hold enough tokens."""

    chosen: list[int]
    """Indices of the samples."""
    num_tokens: int
    """Number of tokens that count as labels."""


def num_fit_tokens(tuning: TuningSection, width: int) -> int:
    """Returns how many tokens exits of hidden size `width` are to be fitted on."""
    return tuning.fit_tokens or TOKENS_PER_UNKNOWN * (width + 1)


def fit_samples(samples: Samples, tuning: TuningSection, width: int) -> FitSamples:
    """Chooses the samples that exits of hidden size `width` are fitted on, the same at every layout.

    They hold tuning.fit_tokens tokens, or all there are. Raises InputError where these are fewer than the unknowns of a
    row of the map.
    """
    wanted, order, chosen, num_tokens = num_fit_tokens(tuning, width), samples.order(tuning.seed), list[int](), 0
    for position in range(order.num_distinct):
        if num_tokens >= wanted:
            break
        chosen.append(order.sample_at(position))
        num_tokens += int(samples.sample(chosen[-1]).loss_mask.sum())
    if num_tokens <= width:
        which = f"tuning.fit_tokens = {tuning.fit_tokens} takes" if num_tokens >= wanted else "the training data hold"
        raise InputError(
            f"exits.init = fitted needs at least {width + 1} tokens to fit, one for each unknown of a row, and {which} "
            f"{num_tokens}; give more, or use exits.init = copy"
        )
    return FitSamples(chosen, num_tokens)


def fit_exits(
    config: Config, samples: Samples, topology: Topology, width: int, listed: ListedTokens | None = None
) -> Fit:
    """Loads the model and fits the exits of `config.exits`, with the shortlist `listed` if given. All ranks call it.

    Only the maps stay in memory. Raises InputError, on all ranks, where model, exits and layout do not fit each other,
    or states are not finite.
    """
    began, taken = time.monotonic(), fit_samples(samples, config.tuning, width)
    if topology.is_logging_rank:
        print(f"fitting exits by least squares on {taken.num_tokens:,} tokens", flush=True)
        if taken.num_tokens < FEW_PER_UNKNOWN * (width + 1):
            warn(
                f"{taken.num_tokens:,} tokens are few for maps of {width + 1} unknowns a row, which then fit these texts and no others; "
                f"tuning.fit_tokens is {TOKENS_PER_UNKNOWN * (width + 1):,} by default"
            )
    loaded = load_for_fitting(config, topology, listed)
    fit = FitPass(loaded, config.tuning, topology)
    fit.run(list(batches_of_each(samples, taken.chosen, config.tuning, dp=topology.dp, dp_rank=topology.dp_rank)))
    maps, other = fit.maps(loaded.stages), fit.other_row()
    del loaded, fit
    gc.collect()  # modules refer to each other in cycles
    if topology.is_logging_rank:
        print(f"fitted in {time.monotonic() - began:.0f} s", flush=True)
    return Fit(maps, fit_record(taken), other)


def fit_record(taken: FitSamples) -> dict[str, float]:
    """Returns the facts about a fit that the artifact keeps."""
    return {"tokens": taken.num_tokens, "ridge": RIDGE}


class FitPass:
    """This stage's part of the pass over the samples."""

    def __init__(self, loaded: LoadedModel, tuning: TuningSection, topology: Topology, kind: type[Relay] = Relay):
        assert loaded.exits is not None
        self._model, self._exits, self._topology = loaded.model, loaded.exits, topology
        shape, dtype = self._model.hidden_shape(tuning.pass_length, tuning.micro_batch_size), self._model.plan.dtype
        student_stages = tuple(
            stage
            for stage, (first, last) in enumerate(loaded.stages[:-1])
            if any(first <= layer <= last for layer in self._exits.exit_layers)
        )
        self._relay, self._feedback = kind(topology, shape, dtype), Feedback(topology, shape, dtype, student_stages)
        self._is_student, self._chunk_tokens = topology.stage in student_stages, tuning.loss_chunk_tokens
        self._forward_length = tuning.forward_chunk_length
        self._cache = KeyValueCache()
        self._joined = JoinedChunks(self._model)
        has_list = bool(self._exits.token_ids) and topology.is_last_stage
        self.other = OtherFit(self._model, self._exits.token_ids, topology) if has_list else None
        """The fit of the shortlist's row of "any other token", on the last stage."""
        self.sums = {
            spec.layer: FitSums(self._model.config.hidden_size, topology.device, topology.tp_rank, topology.tp)
            for spec in self._model.plan.own_exits
        }

    @torch.no_grad()
    def run(self, batches: list[Batch]) -> None:
        """Processes the micro-batches of this replica. All ranks of the replica get the same ones."""
        # chunks whose final states have not arrived yet
        queue: deque[tuple[BatchChunk, dict[int, ExitInput]]] = deque()
        num_ahead = self._topology.pp - 1 - self._topology.stage if self._is_student else 0
        chunks = [chunk for batch in batches for chunk in batch.chunks(self._forward_length)]
        for index, chunk in enumerate(chunks):
            is_last = index == len(chunks) - 1
            inputs, final = self._forward(chunk, NextAction.END if is_last else NextAction.NEXT)
            queue.append((chunk, inputs))
            while len(queue) > (0 if is_last else num_ahead):
                self._add(*queue.popleft(), final)
        self._relay.finish()
        self._feedback.finish()

    def maps(self, stages: list[tuple[int, int]]) -> dict[int, Tensor]:
        """Returns the map of each exit layer as in `Fit`, on the CPU of every rank. All ranks call it.

        `stages` holds the first and last layer of each stage. Raises InputError where the states of an exit are not
        finite.
        """
        topology, width, found = self._topology, self._model.config.hidden_size, {}
        dtype = fitted_dtype(self._exits)
        for head in self._exits.heads:
            stage = next(index for index, (first, last) in enumerate(stages) if first <= head.layer <= last)
            own = torch.empty(width, num_columns(width, head.linear_rank), dtype=dtype)
            writer = topology.writer_of_stage(stage)
            if stage == topology.stage:
                sums = self.sums.pop(head.layer).whole()
                dist.reduce(sums, dst=writer, group=topology.stage_control)
                if topology.rank == writer:
                    own.copy_(
                        solved_of_rank(sums, head.linear_rank)
                        if head.linear_rank
                        else solved(sums, has_bias=head.has_linear)
                    )
            with hang_watchdog(topology, f"the map of the exit after layer {head.layer} (rank {writer} solves for it)"):
                dist.broadcast(own, src=writer, group=topology.world_control)
            if not own.isfinite().all():
                raise InputError(
                    f"exits.init = fitted needs states that are finite, and those of the exit after layer {head.layer} or of "
                    "the last layer are not; look at the model with `ee-tuning verify`, or use exits.init = copy"
                )
            found[head.layer] = own
        return found

    def other_row(self) -> Tensor | None:
        """Returns the row of a shortlist's "any other token", [h] on the CPU of every rank, or None without a
        shortlist.

        All ranks call it. Raises InputError where final states are not finite.
        """
        if not self._exits.token_ids:
            return None
        topology, row = self._topology, torch.empty(self._model.config.hidden_size, dtype=fitted_dtype(self._exits))
        if self.other is not None:
            row.copy_(self.other.row())
        with hang_watchdog(topology, "the row of any other token (the last stage solves for it)"):
            dist.broadcast(row, src=topology.writer_of_stage(topology.pp - 1), group=topology.world_control)
        if not row.isfinite().all():
            raise InputError(
                "exits.init = fitted needs states that are finite, and those of the last layer are not; look at the model "
                "with `ee-tuning verify`, or use exits.init = copy"
            )
        return row

    def _forward(self, chunk: BatchChunk, next_action: NextAction) -> tuple[dict[int, ExitInput], Tensor | None]:
        """Returns the exits' inputs and, on the last stage, the final states [s, b, h]."""
        documents = documents_of(chunk, self._cache, self._topology.device)
        if self._topology.is_first_stage:
            hidden = self._model.embed(to_device(chunk.tokens, self._topology.device), documents)
        else:
            hidden, next_action = self._relay.receive()
        hidden, inputs = self._model.run_layers(hidden, documents)
        if self._topology.is_last_stage:
            final = self._model.final_hidden(hidden)
            self._feedback.send(final)
            return inputs, final
        if self._is_student:
            self._feedback.expect()
        self._relay.send(hidden, next_action=next_action)
        return inputs, None

    def _add(self, chunk: BatchChunk, inputs: dict[int, ExitInput], final: Tensor | None) -> None:
        if not inputs and self.other is None:
            return
        final = self._model.whole_sequence(self._feedback.take() if final is None else final)
        counts = to_device(chunk.loss_mask, final.device)
        if self.other is not None:
            for part in self._chunks(counts.numel()):
                self.other.add(final.flatten(0, 1)[part], counts.flatten()[part])
        if chunk.is_whole or not self._joined.layers:
            self._add_states(inputs, final, counts)
            return
        self._add_states(self._joined.others(inputs), final, counts)
        if whole := self._joined.add(chunk, inputs, {"final": final, "counts": counts}):
            self._add_states(whole[0], whole[1]["final"], whole[1]["counts"])

    def _add_states(self, inputs: dict[int, ExitInput], final: Tensor, counts: Tensor) -> None:  # …, [s, b, h], [s, b]
        final, counts = final.flatten(0, 1), counts.flatten()
        for layer, each in inputs.items():
            states = self._model.exit_head(layer)(each, _states).flatten(0, 1)
            for part in self._chunks(len(states)):
                self.sums[layer].add(states[part], final[part], counts[part])

    def _chunks(self, num_tokens: int) -> Iterator[slice]:
        starts = [*range(0, num_tokens, self._chunk_tokens), num_tokens]
        return (slice(*pair) for pair in itertools.pairwise(starts))


def _states(hidden: Tensor, weight: Tensor) -> Tensor:  # [s, b, h], [v/tp, h] -> [s, b, h]
    return hidden
