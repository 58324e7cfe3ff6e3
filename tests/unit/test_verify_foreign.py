"""`ee-tuning verify` on models of others, and values that are no numbers: damage is found where the format shows it,
the rest is told.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_files import save_legacy
from random_models import random_llama
from safetensors.torch import load_file, save_file

from ee_tuning import cli
from ee_tuning.model_config.config import read_model_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """In two files."""
    random_llama(tmp_path / "model").save_pretrained(tmp_path / "model", max_shard_size="300KB")
    (tmp_path / "model" / "model.safetensors").unlink()
    return tmp_path / "model"


def megatron(model: Path) -> Path:
    """As Megatron-core would have left it: without a manifest."""
    output = model.parent / "megatron"
    assert cli.main(["export", "--format", "megatron", "--model", str(model), "--output", str(output)]) == 0
    for name in ("manifest.json", "config.json", "README.md"):
        (output / name).unlink(missing_ok=True)
    return output


def verify(folder: Path, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["verify", str(folder)]) == code
    captured = capsys.readouterr()
    return captured.out if code < 2 else captured.err


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def poison(model: Path, value: float = float("nan")) -> str:
    """Puts a value into the last file; the tensor's name."""
    path = sorted(model.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    tensors["lm_head.weight"][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return "lm_head.weight"


def test_a_plain_folder_is_checked_as_far_as_it_goes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a manifest refused, or called whole without a word of what nobody looked at."""
    told = verify(model, 0, capsys)
    assert all(str(path) in told for path in model.glob("*.safetensors"))
    assert "tensors are those of a llama with 6 layers" in told and "not checked" in told and "checksums" in told
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    error = verify(model, 2, capsys)
    assert str(shard) in error and error.count("\n") == 1


def test_another_family_s_files_are_looked_at_all_the_same(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that can not be run here taken for a damaged one."""
    path = model / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"gemma"'))
    assert "not checked: whether the tensors are those of the model" in verify(model, 0, capsys)
    path.write_text(
        path.read_text().replace('"gemma"', '"llama"').replace('"num_hidden_layers": 6', '"num_hidden_layers": 7')
    )
    assert "layers.6" in verify(model, 2, capsys)


def test_small_files_that_are_damaged_or_hostile_are_no_mere_remark(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`verify && tune` on a folder that all other commands refuse: an adapter, a pointer for a config, a pickle that
    calls.
    """
    (model / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in verify(model, 2, capsys)
    (model / "adapter_config.json").unlink()
    checkpoint = megatron(model)
    torch.save({"args": _Caller()}, checkpoint / "common.pt")
    assert "posix.system" in verify(checkpoint, 2, capsys)
    (model / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in verify(model, 2, capsys)


class _Caller:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_a_distributed_checkpoint_s_own_checksums_are_compared(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch loads a flipped byte in silence."""
    folder = megatron(model)
    told = verify(folder, 0, capsys)
    assert "__0_0.distcp" in told and "not checked" in told
    flip(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size // 2)
    assert "__0_0.distcp" in verify(folder, 2, capsys)


def test_a_legacy_checkpoint_s_own_checksums_are_compared(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the first rank's files looked at."""
    save_legacy(
        random_llama(model.parent / "again"), read_model_config(model), model.parent / "legacy", 2, (3, 3), is_old=True
    )
    told = verify(model.parent / "legacy", 0, capsys)
    files = sorted((model.parent / "legacy").glob("*/*.pt"))
    assert len(files) == 4 and all(str(path) in told for path in files)
    flip(files[3], files[3].stat().st_size // 2)
    assert str(files[3]) in verify(model.parent / "legacy", 2, capsys)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_verify_finds_what_is_no_number(model: Path, capsys: pytest.CaptureFixture[str], value: float) -> None:
    """NaN is as sound a byte as any to a checksum."""
    name = poison(model, value)
    told = verify(model, 1, capsys)
    assert f"{name} holds 1 value that" in told


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_an_export_warns_and_copies_what_is_there(model: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """A copy that is not the model, or a damaged model passed on without a word."""
    poison(model)
    words = ["export", "--format", kind, "--model", str(model), "--output", str(model.parent / "export")]
    assert cli.main(words) == 0
    error = capsys.readouterr().err
    assert (
        "warning" in error
        and ("lm_head.weight" if kind == "hf" else "output_layer.weight") in error
        and error.count("\n") == 1
    )
    assert (
        cli.main(
            [
                "export",
                "--format",
                "hf",
                "--model",
                str(model.parent / "export"),
                "--output",
                str(model.parent / "back"),
            ]
        )
        == 0
    )
    got = [
        tensors
        for path in (model.parent / "back").glob("*.safetensors")
        if "lm_head.weight" in (tensors := load_file(path))
    ]
    assert got[0]["lm_head.weight"].isnan().sum() == 1


def test_heads_are_not_made_of_what_is_no_number(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours of tuning from NaN; but heads that take nothing of the damaged tensor are as good as ever."""
    name = poison(model)
    words = ["convert", "--model", str(model), "--exit-layers", "2", "--output", str(model.parent / "exits")]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1 and not (model.parent / "exits").exists()
    assert cli.main([*words, "--exit-output", "tied"]) == 0


def test_many_values_are_counted_in_every_dtype(model: Path) -> None:
    """A sum that overflows taken for an infinite value; a half that is never looked at."""
    from ee_tuning.storage.non_finite import num_non_finite

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((300, 7), torch.finfo(dtype).max, dtype=dtype)
        assert num_non_finite(x) == 0
        x[5], x[299, 6] = float("inf"), float("nan")
        assert num_non_finite(x) == 8
    assert num_non_finite(torch.empty(0)) == num_non_finite(torch.ones(3, dtype=torch.bool)) == 0
