"""A relay for dry runs, which receives messages that were never sent."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ee_tuning.parallel.relay import NextAction, Relay


class DryRelay(Relay):
    """A relay that fills in the expected headers itself."""

    def _post_receive(self) -> Any:
        transfer = super()._post_receive()
        with unset_fake_temporarily():
            return transfer._replace(header=torch.tensor([self._num_received, NextAction.NEXT]))
