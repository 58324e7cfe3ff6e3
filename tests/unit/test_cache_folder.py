"""The cache folder exists for every user, also for one without a home."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ee_tuning import cache_folder as module
from ee_tuning.cache_folder import cache_folder
from ee_tuning.kernel import build


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv(module.VARIABLE, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    module._default_folder.cache_clear()
    yield
    module._default_folder.cache_clear()


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_user_without_a_home_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unknown uid in a container: generate and tune ended in a traceback, "Could not determine home directory"."""
    monkeypatch.setattr(Path, "home", _no_home)
    with caplog.at_level(logging.WARNING):
        folder = cache_folder()
        assert cache_folder() == folder and build.kernel_folder() == folder / "kernels"
    assert folder.parent == tmp_path and module.is_private(folder)
    assert len(caplog.records) == 1 and "no home folder" in caplog.text and f"set {module.VARIABLE}" in caplog.text


def test_a_home_that_can_not_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A read-only home, or a full one: tokens were refused without a word of data.cache or EE_TUNING_CACHE."""
    home = tmp_path / "home"
    home.write_text("")
    monkeypatch.setattr(Path, "home", lambda: home)
    with caplog.at_level(logging.WARNING):
        assert cache_folder().name.startswith("ee_tuning-")
    assert f"{home}/.cache/ee_tuning can not be written (Not a directory)" in caplog.text


def test_a_full_disk_is_seen_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk still makes empty files and folders: a probe of no bytes passes, and the first real write fails."""
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):
        monkeypatch.setattr(module.tempfile, "NamedTemporaryFile", lambda **_: full)
        module.check_writable(tmp_path)


def test_a_name_that_another_user_took_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are code: a folder of that name which others may write to would be loaded from."""
    monkeypatch.setattr(Path, "home", _no_home)
    taken = module._temporary_folder()
    taken.chmod(0o777)
    module._default_folder.cache_clear()
    assert cache_folder() != taken and module.is_private(cache_folder())


def test_the_variable_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's EE_TUNING_CACHE that is read once, before it is set."""
    for name in ("a", "b"):
        monkeypatch.setenv(module.VARIABLE, str(tmp_path / name))
        assert cache_folder() == tmp_path / name
