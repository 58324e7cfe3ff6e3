"""Which micro-batches go down the relay, in which order, and what they are for. The same on every stage."""

from collections.abc import Iterator
from dataclasses import dataclass

from ee_tuning.config import TuningSection
from ee_tuning.data.loader import Batch, BatchSource


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One micro-batch and its purpose."""

    batch: Batch
    is_training: bool
    """Whether it is for an optimizer step, or else for a validation."""
    step: int
    """The optimizer step that it is part of, or that its validation follows; 0 before the first."""
    is_last: bool
    """Whether it is the last of its step or of its validation."""
    position: int
    """Samples that all replicas have consumed with it."""
    ends_step: bool
    """Whether the next one, if there is one, is of another step: no validation follows."""


class MicrobatchSchedule:
    """Step after step, with validations where they are due. Endless: whoever walks it stops where it should end."""

    def __init__(self, source: BatchSource, validation: list[Batch], tuning: TuningSection) -> None:
        """`validation` may be empty: then there is none."""
        self._source, self._validation, self._tuning = source, validation, tuning

    def after(self, step: int, *, validates_first: bool) -> Iterator[Microbatch]:
        """The legs from the validation after `step`, if wanted, or else from the next step."""
        if validates_first:
            yield from self.validation(step)
        while True:
            step += 1
            yield from self.training(step)
            if self.validates_after(step):
                yield from self.validation(step)

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows `step`, the last one, say. 0: whether one comes before the first."""
        interval = self._tuning.eval_interval
        return bool(self._validation) and (
            step in (0, self._tuning.train_iters) or bool(interval and step % interval == 0)
        )

    def training(self, step: int) -> Iterator[Microbatch]:
        """The micro-batches of optimizer step `step`."""
        for index in range(self._source.num_microbatches):
            is_last = index == self._source.num_microbatches - 1
            yield Microbatch(
                batch=next(self._source),
                is_training=True,
                step=step,
                is_last=is_last,
                position=self._source.position,
                ends_step=is_last and not self.validates_after(step),
            )

    def validation(self, step: int) -> Iterator[Microbatch]:
        """Those of a validation after `step`."""
        for index, batch in enumerate(self._validation):
            is_last = index == len(self._validation) - 1
            yield Microbatch(
                batch=batch,
                is_training=False,
                step=step,
                is_last=is_last,
                position=self._source.position,
                ends_step=is_last,
            )
