"""A little of what `make stress` does to calibrations with a guarantee."""

from pathlib import Path

from calibration_stress import stress_calibrations


def test_guarantees_are_kept_on_recorded_losses(tmp_path: Path) -> None:
    """Losses that come in clusters, which drawn ones hardly show."""
    assert stress_calibrations(40, 0, tmp_path, num_documents=50).failures == []
