"""One micro-batch through a stage."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ee_tuning.data.loader import Batch
from ee_tuning.parallel.relay import NextAction
from ee_tuning.parallel.vocab import VocabShard
from ee_tuning.tuning.microbatch_schedule import Microbatch
from ee_tuning.tuning.objective import Objective
from ee_tuning.tuning.stage_forward import StageForward, StageOutput


class Counted(Tensor):
    """Counts its copies to a device."""

    num_copies = 0

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        Counted.num_copies += 1
        return self.as_subclass(Tensor).to(*args, **kwargs)


def test_labels_and_mask_are_copied_to_the_device_once_for_all_exits() -> None:
    """A copy for each exit stalls the device as often."""
    weight = torch.zeros(5, 4, requires_grad=True)
    exits: list[Any] = [
        SimpleNamespace(
            layer=layer, begin_microbatch=lambda is_last: None, head=lambda hidden, project: project(hidden, weight)
        )
        for layer in (1, 2, 3)
    ]
    model: Any = SimpleNamespace(exit_vocab=VocabShard(5, 0, 5, None, 1), plan=SimpleNamespace(cuts_sequence=False))
    stage_forward = StageForward(model, None, SimpleNamespace(device=torch.device("cpu")), 2, Objective())  # type: ignore[arg-type]
    batch = Batch(
        tokens=torch.zeros(1, 3, dtype=torch.int64),
        labels=torch.zeros(3, 1, dtype=torch.int64).as_subclass(Counted),
        loss_mask=torch.ones(3, 1).as_subclass(Counted),
    )
    inputs: Any = {layer: torch.ones(3, 1, 4) for layer in (1, 2, 3)}
    output = StageOutput(
        Microbatch(batch=batch, is_training=True, step=1, is_last=True, position=1, ends_step=True),
        NextAction.NEXT,
        inputs,
        None,
    )
    for walked in (
        lambda: stage_forward.train(output, None, exits),
        lambda: stage_forward.evaluate(output, None, exits),
    ):
        assert list(walked()) == [1, 2, 3] and Counted.num_copies == 2
        Counted.num_copies = 0
