"""The exit-heads artifact: first weights, the folder, and what is refused of one."""

import dataclasses
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_llama
from refusals import refusal
from safetensors.torch import load_file, save_file

from ee_tuning import config as job
from ee_tuning.artifact import exit_init
from ee_tuning.artifact.convert import initial_exits_config
from ee_tuning.artifact.exit_heads import (
    CONFIG,
    ExitHeadsConfig,
    ExitHeadsReader,
    check_bound_to,
    read_exit_config,
    read_exit_tensor,
    save_exit_heads,
)
from ee_tuning.artifact.exit_init import InitialExits
from ee_tuning.checkpoint.huggingface import HuggingFaceReader
from ee_tuning.errors import InputError
from ee_tuning.model_config.config import read_model_config

TENSORS = "exit_heads.safetensors"


def first_weights(folder: Path, **section: Any) -> InitialExits:
    config = job.replace(job.Config(), exits={"exit_layers": (2, 4), **section})
    model, reader = read_model_config(folder), HuggingFaceReader(folder)
    return InitialExits(initial_exits_config(config, model, reader), reader, model)


def save(source: InitialExits, output: Path, exits: ExitHeadsConfig | None = None, **options: Any) -> Path:
    save_exit_heads(
        output, exits or source.exits, source.config, ((name, source.full(name)) for name in source.shapes), **options
    )
    return output


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder)
    return folder


@pytest.fixture
def artifact(llama: Path, tmp_path: Path) -> Path:
    return save(first_weights(llama), tmp_path / "exits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ties_embeddings", [False, True])
def test_copies_are_the_backbone_s_own_bytes(tmp_path: Path, dtype: torch.dtype, ties_embeddings: bool) -> None:
    """A cast on the way, another layer's MLP, or lm_head where the embedding is meant, would break equality with the
    full model.
    """
    model = random_llama(tmp_path / "llama", tie_word_embeddings=ties_embeddings).to(dtype)
    model.save_pretrained(tmp_path / "llama")
    weights = model.state_dict()
    saved = load_file(save(first_weights(tmp_path / "llama"), tmp_path / "exits") / TENSORS)
    expected = {}
    for layer in (2, 4):
        expected[f"exits.{layer}.norm.weight"] = weights["model.norm.weight"]
        for part in ("gate", "up", "down"):
            expected[f"exits.{layer}.mlp.{part}_proj.weight"] = weights[
                f"model.layers.{layer - 1}.mlp.{part}_proj.weight"
            ]
        expected[f"exits.{layer}.output.weight"] = weights[
            "model.embed_tokens.weight" if ties_embeddings else "lm_head.weight"
        ]
    assert saved.keys() == expected.keys()
    assert all(saved[name].dtype == dtype and torch.equal(saved[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("architecture", "output", "parts"),
    [
        ("embedding", "untied", {"output.weight"}),
        ("norm", "tied", {"norm.weight"}),
        ("norm", "untied", {"norm.weight", "output.weight"}),
        ("mlp", "tied", {"norm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}),
    ],
)
def test_an_artifact_holds_what_its_heads_own_and_no_more(
    llama: Path, architecture: str, output: str, parts: set[str]
) -> None:
    """A tied output stored would be trained bytes that nobody reads."""
    shapes = first_weights(llama, architecture=architecture, output=output).shapes
    assert set(shapes) == {f"exits.{layer}.{part}" for layer in (2, 4) for part in parts}


def test_random_weights_have_the_reference_s_spread(llama: Path) -> None:
    """Residual projections as wide as the rest would drown the residual stream at deep exits."""
    source = first_weights(llama, init="random")
    down = source.full("exits.4.mlp.down_proj.weight")
    assert down.std().item() == pytest.approx(0.2 / math.sqrt(8), rel=0.05)
    assert source.full("exits.4.mlp.up_proj.weight").std().item() == pytest.approx(0.2, rel=0.05)
    assert torch.equal(source.full("exits.2.norm.weight"), torch.ones(48))


def test_random_weights_depend_on_seed_and_name_alone(llama: Path) -> None:
    """Drawn in turn from one generator, they would change with the layout, and with which other exits there are."""
    source, other = first_weights(llama, init="random"), first_weights(llama, init="random", exit_layers=(4,))
    name = "exits.4.mlp.gate_proj.weight"
    assert torch.equal(source.full(name), other.full(name))
    assert torch.equal(source.full(name)[5:9], source.rows(name, 5, 9))
    assert torch.equal(source.full(name)[:, 5:9], source.columns(name, 5, 9))
    assert not torch.equal(source.full(name), source.full("exits.2.mlp.gate_proj.weight"))
    assert not torch.equal(source.full(name), first_weights(llama, init="random", seed=1).full(name))


@pytest.mark.parametrize("init", ["copy", "random"])
@pytest.mark.parametrize(
    "parameter",
    [
        "norm.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
        "output.weight",
        "adapter.down.weight",
        "layer.self_attention.linear_qkv.weight",
        "layer.self_attention.linear_proj.weight",
    ],
)
def test_a_rank_reads_the_same_from_the_artifact_as_from_the_first_weights(
    llama: Path, tmp_path: Path, init: str, parameter: str
) -> None:
    """Tuning without an artifact begins from these sources directly: it must begin where a converted one begins."""
    part = parameter.partition(".")[0]
    source = first_weights(llama, init=init, architecture=("norm", part if part in ("layer", "adapter") else "mlp"))
    with ExitHeadsReader(save(source, tmp_path / "exits")) as reader:
        for rank in range(2):
            place = (source.config, source.exits.heads[1], parameter, 2, rank, torch.float64)
            assert torch.equal(read_exit_tensor(reader, *place), read_exit_tensor(source, *place))


def test_a_number_that_the_artifact_has_no_room_for_is_refused(tmp_path: Path) -> None:
    """A norm in float32 beside weights in float16: heads with an infinite norm, made by whoever does not go through
    `convert`.
    """
    random_llama(tmp_path, num_hidden_layers=4, dtype=torch.float16).half().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "model.norm.weight": torch.full([48], 1e5)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    source = first_weights(tmp_path, architecture="norm")
    for read in (source.full, lambda name: list(source.blocks(name))):
        with pytest.raises(InputError, match=r"tensor model\.norm\.weight holds 48 values .* float16"):
            read("exits.4.norm.weight")


def test_shards_with_an_index_are_read_as_one_file_is(llama: Path, tmp_path: Path) -> None:
    """Large artifacts are cut: a tensor at the seam, or larger than a shard, must come back."""
    source = first_weights(llama)
    folder = save(source, tmp_path / "exits", shard_bytes=20_000)
    with ExitHeadsReader(folder) as reader:
        reader.check_complete(source.config)
        assert all(torch.equal(reader.full(name), source.full(name)) for name in source.shapes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"exit_heads-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 22_000 for path in folder.glob("*.safetensors"))


def test_what_is_saved_is_read_back_with_how_it_was_tuned(llama: Path, tmp_path: Path) -> None:
    """The config is read strictly: a field written otherwise than it is read would make every artifact unreadable."""
    source = first_weights(llama, init="random")
    exits = dataclasses.replace(source.exits, tuned={"steps": 10, "tokens": 1280})
    assert ExitHeadsReader(save(source, tmp_path / "exits", exits)).config == exits


def test_files_are_readable_as_the_umask_says(llama: Path, tmp_path: Path) -> None:
    """safetensors' own writer makes files that colleagues can not read."""
    old = os.umask(0o027)
    try:
        folder = save(first_weights(llama), tmp_path / "exits")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_a_flipped_byte_is_found(artifact: Path) -> None:
    """safetensors loads an altered weight in silence."""
    data = bytearray((artifact / TENSORS).read_bytes())
    data[-7] ^= 1
    (artifact / TENSORS).write_bytes(data)
    message = refusal(lambda: ExitHeadsReader(artifact))
    assert str(artifact / TENSORS) in message and "again" in message


@pytest.mark.parametrize("name", [TENSORS, CONFIG, "manifest.json"])
def test_a_truncated_or_missing_file_is_named(artifact: Path, name: str) -> None:
    """Half a download."""
    path = artifact / name
    path.write_bytes(path.read_bytes()[:-10])
    assert str(path) in refusal(lambda: ExitHeadsReader(artifact))
    path.unlink()
    assert name in refusal(lambda: ExitHeadsReader(artifact))


def test_a_file_that_the_manifest_leaves_out_is_refused(artifact: Path) -> None:
    """Taking a line out of the manifest would be a way around it."""
    path = artifact / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["files"][TENSORS]
    path.write_text(json.dumps(tree))
    assert TENSORS in refusal(lambda: ExitHeadsReader(artifact))


def test_a_manifest_reads_no_file_elsewhere(artifact: Path) -> None:
    """A hostile manifest could have any file hashed, and its hash told."""
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace(TENSORS, f"../exits/{TENSORS}"))
    assert str(path) in refusal(lambda: ExitHeadsReader(artifact))


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 6},
        {"draft": {"family": "gpt2"}},
        {"architecture": "eagle3"},
        {"adds_linear": [2]},
        {"fitted": 3},
        {"exit_layers": [4, 2]},
        {"exit_layers": []},
        {"exit_layers": "24"},
        {"architecture": "lstm"},
        {"architecture": ["mlp"]},
        {"architecture": ["mlp", "adapter"]},
        {"adapter_rank": 8},
        {"output": "none"},
        {"dtype": "cdouble"},
        {"init": None},
        {"model_fingerprint": 3},
        {"surprise": 1},
        {"tuned": "yes"},
    ],
)
def test_an_exit_config_is_read_strictly(llama: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """A key of a later version ignored would run other heads than were saved."""
    source = first_weights(llama)
    folder = save(source, tmp_path / "exits")
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert str(path) in refusal(lambda: read_exit_config(folder))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_artifact_of_an_earlier_format_is_read(llama: Path, tmp_path: Path, version: int) -> None:
    """Exits that were tuned before heads could differ would have to be tuned again."""
    folder = save(first_weights(llama), tmp_path / "exits")
    path = folder / CONFIG
    tree = {**json.loads(path.read_text()), "format_version": version}
    for key in (
        "output_vocab",
        *(["adds_linear", "fitted"] if version < 3 else []),
        *(["adapter_rank"] if version == 1 else []),
    ):
        del tree[key]
    exits = read_exit_config(folder)
    path.write_text(json.dumps(tree))
    assert tree["architecture"] == "mlp" and read_exit_config(folder) == exits


def test_exits_of_another_backbone_are_refused_by_both_names(artifact: Path) -> None:
    """Heads on another model decode noise."""
    reader = ExitHeadsReader(artifact)
    check_bound_to(reader, reader.config.model_fingerprint)
    message = refusal(lambda: check_bound_to(reader, "f" * 64))
    assert (
        reader.config.model_name in message and "ffffffff" in message and reader.config.model_fingerprint[:8] in message
    )


def test_exits_that_do_not_fit_the_model_s_shape_are_refused(artifact: Path, llama: Path) -> None:
    """A wrong width must end in a line that names the tensor, not in a traceback of copy_."""
    model = dataclasses.replace(read_model_config(llama), ffn_hidden_size=90)
    assert "exits.2.mlp.gate_proj.weight" in refusal(lambda: ExitHeadsReader(artifact).check_complete(model))
    shallow = dataclasses.replace(read_model_config(llama), num_layers=3)
    assert "1..3" in refusal(lambda: ExitHeadsReader(artifact).check_complete(shallow))


def test_blocks_of_a_random_tensor_are_the_tensor_drawn_at_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model's random exits, because memory was spared; a fine seam where two blocks meet."""
    source = first_weights(llama, init="random")
    for name in ("exits.2.output.weight", "exits.2.mlp.down_proj.weight", "exits.2.norm.weight"):
        monkeypatch.setattr(exit_init, "BLOCK_BYTES", 1 << 30)
        whole = source.full(name)
        monkeypatch.setattr(exit_init, "BLOCK_BYTES", 1)
        blocks = list(source.blocks(name))
        assert torch.equal(torch.cat(blocks), whole) and (len(blocks) > 2 or whole.dim() == 1)
