"""Signals that ask a run to stop, sent to this very process."""

import os
import signal
from types import FrameType

import pytest

from ee_tuning.tuning import stopping
from ee_tuning.tuning.stopping import StopRequest


def test_a_signal_that_a_launcher_repeats_does_not_end_the_process_before_its_checkpoint() -> None:
    """A group kill and torchrun's own forwarding give each worker two SIGTERMs within milliseconds; the second one
    ended it.
    """
    acted: list[int] = []

    def act(number: int, frame: FrameType | None) -> None:
        acted.append(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    former = [signal.signal(number, act) for number in numbers]
    try:
        with StopRequest() as stop:
            assert not stop.is_requested
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
                assert stop.is_requested
        assert acted == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert acted == [signal.SIGTERM]  # what was before is in force again
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)


def test_a_second_press_of_control_c_ends_the_process_and_a_forwarded_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that can not be left by the keyboard, or one that torchrun's forwarded SIGINT robs of its checkpoint."""
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.1
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_requested
        now += stopping.SECONDS_OF_ONE_PRESS
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
