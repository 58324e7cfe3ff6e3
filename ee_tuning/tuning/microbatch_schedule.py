"""The order and purpose of the micro-batches that go down the relay. The same on every stage."""

from collections.abc import Iterator
from dataclasses import dataclass

from ee_tuning.config import TuningSection
from ee_tuning.data.loader import Batch, BatchChunk, BatchSource


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """A micro-batch, or a chunk of its sequences, and its purpose."""

    chunk: BatchChunk
    is_training: bool
    """Whether it belongs to an optimizer step, and not to a validation."""
    step: int
    """The optimizer step that it belongs to, or that its validation follows; 0 before the first step."""
    is_last: bool
    """Whether it is the last one of its step or of its validation, and the last chunk."""
    position: int
    """Number of samples that all replicas have consumed after the micro-batch."""
    ends_step: bool
    """Whether it is the last one of its step, the step's validation included."""


class MicrobatchSchedule:
    """All optimizer steps, with validations where they are due. Endless: the caller stops."""

    def __init__(self, source: BatchSource, validation: list[Batch], tuning: TuningSection) -> None:
        """Plans the run; `validation` without batches plans no validations."""
        self._source, self._validation, self._tuning = source, validation, tuning

    def after(self, step: int, *, validates_first: bool) -> Iterator[Microbatch]:
        """Yields micro-batches, from the validation after `step` if wanted, or else from the next step."""
        if validates_first:
            yield from self.validation(step)
        while True:
            step += 1
            yield from self.training(step)
            if self.validates_after(step):
                yield from self.validation(step)

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows `step`. For step 0: whether one precedes the first step."""
        interval = self._tuning.eval_interval
        return bool(self._validation) and (
            step in (0, self._tuning.train_iters) or bool(interval and step % interval == 0)
        )

    def training(self, step: int) -> Iterator[Microbatch]:
        """Yields the micro-batches of optimizer step `step`."""
        for index in range(self._source.num_microbatches):
            is_last = index == self._source.num_microbatches - 1
            yield from self._chunks(
                next(self._source),
                is_training=True,
                step=step,
                is_last=is_last,
                ends_step=is_last and not self.validates_after(step),
            )

    def validation(self, step: int) -> Iterator[Microbatch]:
        """Yields the micro-batches of a validation after `step`."""
        for index, batch in enumerate(self._validation):
            is_last = index == len(self._validation) - 1
            yield from self._chunks(batch, is_training=False, step=step, is_last=is_last, ends_step=is_last)

    def _chunks(
        self, batch: Batch, *, is_training: bool, step: int, is_last: bool, ends_step: bool
    ) -> Iterator[Microbatch]:
        for chunk in batch.chunks(self._tuning.forward_chunk_length):
            yield Microbatch(
                chunk=chunk,
                is_training=is_training,
                step=step,
                is_last=is_last and chunk.ends_rows,
                position=self._source.position,
                ends_step=ends_step and chunk.ends_rows,
            )
