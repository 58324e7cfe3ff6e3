"""Pickles of checkpoints: what is data is read, whatever can run is refused, and nothing is imported for either."""

import datetime
import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import safe_globals
from megatron_arguments import other_arguments

from ee_tuning.errors import InputError
from ee_tuning.storage.metadata_pickle import check_metadata_pickle, read_metadata_pickle
from ee_tuning.storage.open_files import MappedFile
from ee_tuning.storage.pickled_names import Inert, harmless, plain_name
from ee_tuning.storage.torch_file import Archive, StoredTensor


def content(folder: Path, what: Any) -> Any:
    torch.save(what, folder / "file.pt")
    return Archive(folder / "file.pt", MappedFile(folder / "file.pt")).content


def test_all_that_megatron_holds_for_safe_is_read(tmp_path: Path) -> None:
    """A checkpoint with Megatron-LM's default arguments called dangerous: exit_signal is a signal."""
    assert all(harmless(f"{kind.__module__}.{kind.__qualname__}") for kind in safe_globals.SAFE_GLOBALS)
    got = content(tmp_path, other_arguments())
    assert got["fp8_dtype"] is torch.float8_e4m3fn and got["tags"] == {"a", "b"} and got["dataset"].split == "99,1,0"
    assert "15" in repr(got["exit_signal"]) and isinstance(got["optimizer"], Inert)


@pytest.mark.parametrize(
    "value",
    [
        datetime.timedelta(seconds=3),
        frozenset({1}),
        slice(1, 2),
        range(3),
        bytearray(b"ab"),
        1j,
        {"a": torch.nn.Parameter(torch.ones(2))},
    ],
)
def test_plain_data_of_python_is_read(tmp_path: Path, value: Any) -> None:
    """torch.save writes the names that Python 2 had: a set among the arguments was refused as __builtin__.set."""
    content(tmp_path, {"args": value})


def test_a_tensor_of_a_dtype_without_a_storage_class_is_read(tmp_path: Path) -> None:
    """float8 scales beside the weights made the whole file unreadable."""
    tensor = content(tmp_path, {"scale": torch.arange(12).to(torch.uint16).reshape(3, 4)[1:]})["scale"]
    assert isinstance(tensor, StoredTensor) and tensor.mapped().tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("functools", "partial"),
        ("signal", "signal"),
        ("megatron.core.utils", "import_module"),
        ("megatron.core.x", "os.system"),
        ("numpy.testing", "runstring"),
        ("torch", "load"),
        ("signal", "SIGTERM.__class__"),
        ("megatronic", "Evil"),
        ("collections", "namedtuple"),
        ("torch", "storage"),
        ("numpy", "load"),
    ],
)
def test_whatever_can_run_is_refused(module: str, name: str) -> None:
    """A rule for classes that lets a function through, or an attribute of a module."""
    with pytest.raises(KeyError):
        harmless(plain_name(module, name))


def test_nothing_is_imported_for_a_class_that_is_passed_over(tmp_path: Path) -> None:
    """A module's code runs when it is imported, whatever the class does."""
    (tmp_path / "data.pkl").write_bytes(
        b"\x80\x02cmegatron.training.never_there\nConfig\n)R}X\x01\x00\x00\x00aK\x01sb."
    )
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.write(tmp_path / "data.pkl", "archive/data.pkl")
    assert isinstance(Archive(tmp_path / "file.pt", MappedFile(tmp_path / "file.pt")).content, Inert)
    assert "megatron.training" not in sys.modules


def test_a_description_may_say_where_it_was_written(tmp_path: Path) -> None:
    """torch keeps the path that a checkpoint was saved to as it was given, a pathlib.Path as such."""
    dcp.save({"w": torch.zeros(4)}, checkpoint_id=tmp_path / "saved")
    described = read_metadata_pickle(tmp_path / "saved")
    described.storage_meta.checkpoint_id = Path("elsewhere")
    buffer = io.BytesIO()
    pickle.dump(described, buffer)
    (tmp_path / "saved" / ".metadata").write_bytes(buffer.getvalue())
    assert list(read_metadata_pickle(tmp_path / "saved").state_dict_metadata) == ["w"]
    with pytest.raises(InputError, match="pathlib"):
        check_metadata_pickle(tmp_path / "saved")  # torch would import and call what it names
