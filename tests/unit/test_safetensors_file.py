"""Our reader of safetensors against the format's own library: the same tensors, by any slices, and the same files
refused.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ee_tuning.errors import InputError
from ee_tuning.storage.safetensors_file import SafetensorsFile

TENSORS = {
    "cube": torch.randn(3, 5, 7),
    "matrix": torch.randn(11, 6).bfloat16(),
    "vector": torch.randn(9, dtype=torch.float64),
    "number": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
    "ids": torch.arange(5),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_every_part_of_every_tensor_is_what_the_library_reads(path: Path) -> None:
    """A stride off by one dimension gives numbers of a neighbour."""
    file, wanted = SafetensorsFile(path), load_file(path)
    assert {name: entry.shape for name, entry in file.entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in wanted.items()
    }
    for name, tensor in wanted.items():
        assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype
    for part in [
        (slice(1, 3),),
        (slice(None), slice(2, 4)),
        (slice(0, 2), slice(1, 5), slice(3, 4)),
        (slice(2, 2),),
        (slice(None), slice(None), slice(0, 6)),
        (slice(1, 2), slice(None), slice(2, None)),
    ]:
        assert torch.equal(file.read("cube", part), TENSORS["cube"][part])
    assert torch.equal(file.read("matrix", (slice(None), slice(5, 6))), TENSORS["matrix"][:, 5:6])


def test_metadata_may_be_null(path: Path) -> None:
    """A whole model that the library reads is said to be broken, to be fetched again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps({**json.loads(data[8 : 8 + length]), "__metadata__": None}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert torch.equal(SafetensorsFile(path).read("cube"), load_file(path)["cube"])


def test_reading_takes_no_more_memory_than_the_part(tmp_path: Path) -> None:
    """Mapped pages count as the process's own: reading a large model piece by piece would fill a small machine."""
    save_file({"large": torch.zeros(64, 1 << 20)}, tmp_path / "large.safetensors")
    file, before = SafetensorsFile(tmp_path / "large.safetensors"), resident()
    for row in range(64):
        file.read("large", (slice(row, row + 1),))
    assert resident() - before < 64 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "header",
    [
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [0], "data_offsets": [12, 12]},
        },
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2, -1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}},
        {"a": 1},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        [],
        {"__metadata__": {"a": 1}, "b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},
    ],
    ids=str,
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path: Path, header: object) -> None:
    """Believing an offset, a shape or a type that the others contradict."""
    path, text = tmp_path / "a.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(InputError, match=r"a\.safetensors is not a whole safetensors file"):
        SafetensorsFile(path)


BY_THE_LIBRARY = """
import os, sys
from safetensors import safe_open
part = safe_open(sys.argv[1], "numpy").get_slice("matrix")
os.truncate(sys.argv[1], 4096)
part[8000:8001]
"""


def test_a_file_that_is_cut_short_meanwhile_is_an_error(tmp_path: Path) -> None:
    """A copy that goes on, a disk that is full: the library maps the file, and the process dies without a word, which
    is why it does not read here.
    """
    path = tmp_path / "a.safetensors"
    save_file({"matrix": torch.ones(8192, 64)}, path)
    whole = path.read_bytes()
    library = subprocess.run([sys.executable, "-c", BY_THE_LIBRARY, str(path)], check=False)
    assert library.returncode == -signal.SIGBUS
    path.write_bytes(whole)
    file = SafetensorsFile(path)
    assert file.read("matrix", (slice(0, 1),)).sum() == 64
    os.truncate(path, 4096)
    with pytest.raises(InputError, match="cut short while it was read, in tensor matrix; fetch it again"):
        file.read("matrix", (slice(8000, 8001),))
