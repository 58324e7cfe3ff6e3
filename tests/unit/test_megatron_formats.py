"""Megatron's checkpoints: the same model as Hugging Face's, and nothing in them is believed or run."""

import fractions
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from decoding import full_logits
from exits import loaded_with
from megatron_files import save_legacy, save_stock_model
from random_models import random_llama
from refusals import Hostile, refusal

from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import OpenModel, model_folder, open_model
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.checkpoint.verify import verify_folder
from ee_tuning.config import ModelSection, load_config
from ee_tuning.errors import InputError
from ee_tuning.export.megatron_writer import write_megatron
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.model_config.config import model_config_from_hf, read_model_config
from ee_tuning.model_config.huggingface_config import huggingface_config
from ee_tuning.model_config.megatron_args import model_config_from_megatron
from ee_tuning.storage import distcp_writer
from ee_tuning.storage.open_files import MappedFile
from ee_tuning.storage.torch_file import Archive

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, the same in `legacy` (TP2, uneven stages), and in `megatron`, as stock Megatron-core saves it from one
    process.
    """
    folder = tmp_path_factory.mktemp("shared")
    reference = random_llama(folder / "hf")
    save_legacy(reference, read_model_config(folder / "hf"), folder / "legacy", 2, (2, 4), is_old=False)
    save_stock_model(str(folder / "hf"), str(folder / "megatron"), 1, 1, None, True)
    return folder


def opened(path: Path, **keys: Any) -> OpenModel:
    return open_model(ModelSection(path=str(path), **keys))


def all_rows(model: OpenModel) -> dict[str, torch.Tensor]:
    model.source.check_complete(model.config)
    return {name: model.source.rows(name, 0, shape[0]) for name, shape in backbone_tensor_shapes(model.config).items()}


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(("tp", "stages"), [(1, (6,)), (2, (6,)), (2, (1, 5)), (1, (2, 2, 2))])
def test_a_legacy_checkpoint_is_the_same_model(tmp_path: Path, is_old: bool, tp: int, stages: tuple[int, ...]) -> None:
    """Shards merged in the wrong order, stages that number their layers from zero, columns read along the wrong
    axis.
    """
    reference = random_llama(tmp_path / "hf")
    save_legacy(reference, read_model_config(tmp_path / "hf"), tmp_path / "run" / "release", tp, stages, is_old=is_old)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release")
    wanted, got = opened(tmp_path / "hf"), opened(tmp_path / "run")
    assert got.kind == "legacy_megatron" and fingerprint(*got[:2]) == fingerprint(*wanted[:2])
    tensors = all_rows(got)
    for name, tensor in all_rows(wanted).items():
        assert torch.equal(tensors[name], tensor), name
        if tensor.dim() == 2:
            assert torch.equal(got.source.columns(name, 5, 33), tensor[:, 5:33]), name
    model = loaded_with(tmp_path / "run").model
    tokens = torch.randint(0, 100, (2, 19))
    with torch.no_grad():
        torch.testing.assert_close(full_logits(model, tokens), reference(tokens).logits, rtol=0, atol=1e-4)


def test_a_tied_output_matrix_is_read_once(tmp_path: Path) -> None:
    """The copy of the embedding that Megatron keeps on its last stage taken for an output matrix, or for a tensor too
    many.
    """
    reference = random_llama(tmp_path / "hf", tie_word_embeddings=True)
    config = read_model_config(tmp_path / "hf")
    save_stock_model(str(tmp_path / "hf"), str(tmp_path / "megatron"), 1, 1, None, True)
    save_legacy(reference, config, tmp_path / "legacy", 2, (3, 3), is_old=True)
    prints = set()
    for name in ("hf", "megatron", "legacy"):
        model = opened(tmp_path / name)
        assert model.config.ties_embeddings and "lm_head.weight" not in all_rows(model)
        prints.add(fingerprint(*model[:2]))
    assert len(prints) == 1


def test_experts_in_a_legacy_checkpoint_are_refused(tmp_path: Path) -> None:
    """Experts that were cut over ranks otherwise than anything here reads."""
    reference = random_llama(tmp_path / "hf")
    save_legacy(
        reference, read_model_config(tmp_path / "hf"), tmp_path / "legacy", 2, (6,), is_old=False, num_experts=4
    )
    message = refusal(lambda: opened(tmp_path / "legacy"))
    assert all(word in message for word in (str(tmp_path / "legacy"), "legacy", "experts", "torch_dist"))


@pytest.mark.parametrize(
    "file", ["legacy/mp_rank_01_000/model_optim_rng.pt", "megatron/common.pt", "megatron/.metadata"]
)
def test_a_hostile_pickle_is_refused_by_its_file(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A checkpoint from a stranger that runs commands on whoever looks at it."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(shared / file.split("/")[0], tmp_path / "model"))
    target = folder.joinpath(*file.split("/")[1:])
    if target.name == ".metadata":
        import pickle

        target.write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"model": {}, "args": Hostile()}, target)
    message = refusal(lambda: all_rows(opened(folder)))
    assert str(target) in message and "posix.system" in message and not (tmp_path / "hostile").exists()


def test_a_hostile_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor of a distributed checkpoint is a pickle of its own."""
    monkeypatch.chdir(tmp_path)
    torch.save(Hostile(), tmp_path / "__0_0.distcp")
    message = refusal(lambda: Archive(tmp_path / "__0_0.distcp", MappedFile(tmp_path / "__0_0.distcp")))
    assert "__0_0.distcp" in message and not (tmp_path / "hostile").exists()


def test_trust_is_the_way_past_a_pickle(tmp_path: Path) -> None:
    """Somebody's own class among the saved arguments makes a checkpoint unreadable for ever."""
    reference = random_llama(tmp_path / "hf")
    config = read_model_config(tmp_path / "hf")
    save_legacy(reference, config, tmp_path / "model", 1, (6,), is_old=True, own=fractions.Fraction(1, 3))
    message = refusal(lambda: opened(tmp_path / "model"))
    assert "fractions.Fraction" in message and "--trust-pickle" in message
    assert opened(tmp_path / "model", trust_pickle=True).config.num_layers == 6
    assert "--trust-pickle" in refusal(lambda: verify_folder(tmp_path / "model")) and verify_folder(
        tmp_path / "model", trust_pickle=True
    )


@pytest.mark.parametrize("kind", ["megatron", "legacy"])
def test_damage_is_detected(shared: Path, tmp_path: Path, kind: str) -> None:
    """torch loads flipped bytes without a word: half a copy, or a bad disk, is a model that speaks nonsense."""
    wanted = all_rows(opened(shared / "hf"))
    source = random.Random(0)
    num_detected = 0
    files = [path for path in sorted((shared / kind).rglob("*")) if path.is_file()]
    for number in range(60):
        folder = Path(shutil.copytree(shared / kind, tmp_path / str(number)))
        victim = folder / source.choice(files).relative_to(shared / kind)
        data = bytearray(victim.read_bytes())
        if number % 4 == 0:
            del data[source.randrange(len(data)) :]
        else:
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        victim.write_bytes(data)
        try:
            # The shape is given: what a flipped bit among the arguments does, their own checksum says.
            got = all_rows(opened(folder, config=str(shared / "hf" / "config.json")))
        except InputError as error:
            assert str(folder) in str(error) and "\n" not in str(error), error
            num_detected += 1
        else:
            assert all(torch.equal(got[name], wanted[name]) for name in wanted), victim
        shutil.rmtree(folder)
    assert num_detected > 30


@pytest.mark.parametrize("is_qwen", [True, False])
def test_layers_without_experts_come_back_from_a_config_json_or_make_none(is_qwen: bool) -> None:
    """An export whose config.json tells of other layers and other widths than its weights have."""
    config = model_config_from_megatron(
        {
            "num_layers": 6,
            "hidden_size": 48,
            "ffn_hidden_size": 88,
            "moe_ffn_hidden_size": 20,
            "num_attention_heads": 4,
            "kv_channels": 12,
            "vocab_size": 101,
            "max_position_embeddings": 128,
            "num_experts": 5,
            "moe_layer_freq": 2,
            "qk_layernorm": is_qwen,
            "untie_embeddings_and_output_weights": True,
        },
        Path("args"),
    )
    assert config.dense_layers == (2, 4, 6) and config.ffn_hidden_size == 88 and config.moe_ffn_hidden_size == 20
    if is_qwen:
        assert model_config_from_hf(huggingface_config(config), Path("config.json")) == config
        return
    assert "must have experts in every layer, and layers 2, 4, 6 have none" in refusal(
        lambda: huggingface_config(config)
    )


def test_files_that_are_missing_are_named(shared: Path, tmp_path: Path) -> None:
    """A shard that was not copied along."""
    folder = Path(shutil.copytree(shared / "legacy", tmp_path / "legacy"))
    shutil.rmtree(folder / "mp_rank_01_001")
    assert "rank 1 of stage 1" in refusal(lambda: opened(folder))
    folder = Path(shutil.copytree(shared / "megatron", tmp_path / "megatron"))
    next(folder.glob("*.distcp")).unlink()
    assert ".distcp" in refusal(lambda: all_rows(opened(folder)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalization": "LayerNorm"}, ["normalization", "LayerNorm"]),
        ({"add_qkv_bias": True}, ["linear_qkv.bias"]),
        ({"num_experts": 8}, ["mlp.router.weight"]),
        ({"num_experts": 8, "moe_router_pre_softmax": True}, ["num_experts", "pre_softmax"]),
        ({"num_experts": 8, "moe_shared_expert_intermediate_size": 16}, ["moe_shared_expert_intermediate_size = 16"]),
        ({"num_experts": 8, "moe_layer_freq": [1, 0]}, ["moe_layer_freq", "6 layers", "[1, 0]"]),
        ({"rotary_interleaved": True}, ["rotary_interleaved"]),
        ({"num_layers": 5}, ["linear_qkv", "6 layers", "5 layers"]),
        ({"num_layers": 7}, ["layers.6"]),
        ({"ffn_hidden_size": 80}, ["linear_fc1", "160", "176"]),
        ({"vocab_size": 129}, ["129", "vocab_size"]),
        ({"hidden_size": "48"}, ["hidden_size", "'48'"]),
    ],
)
def test_a_shape_that_is_another_models_is_refused(
    shared: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    """Saved arguments that name what this project would leave out, or a shape given by hand that cuts weights off."""
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump(changes))
    message = refusal(lambda: all_rows(opened(shared / "megatron", config=str(shape))))
    assert all(word in message for word in words), message


def test_the_shape_can_be_given(shared: Path, tmp_path: Path) -> None:
    """A checkpoint without saved arguments that can not be used at all; a misspelt key that is passed over."""
    folder = tmp_path / "megatron"
    save_stock_model(str(shared / "hf"), str(folder), 1, 1, None, True, "nowhere")
    assert "--config" in refusal(lambda: opened(folder))
    shape = opened(shared / "hf").config
    written = tmp_path / "shape.yaml"
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "max_position_embeddings",
        "norm_epsilon",
    )
    written.write_text(
        yaml.safe_dump({**{name: getattr(shape, name) for name in names}, "untie_embeddings_and_output_weights": True})
    )
    for given in (written, shared / "hf" / "config.json"):
        got = opened(folder, config=str(given))
        assert fingerprint(*got[:2]) == fingerprint(*opened(shared / "hf")[:2])
    written.write_text("num_layer: 6\n")
    assert "num_layer;" in refusal(lambda: opened(folder, config=str(written)))
    assert "--config" in refusal(lambda: opened(shared / "hf", config=str(written)))


def test_old_orders_of_queries_keys_and_values_are_refused(tmp_path: Path) -> None:
    """Weights of Megatron's first versions read in today's order give a model that speaks nonsense."""
    reference = random_llama(tmp_path / "hf")
    save_legacy(reference, read_model_config(tmp_path / "hf"), tmp_path / "old", 1, (6,), is_old=True)
    file = tmp_path / "old" / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({**torch.load(file, weights_only=False), "checkpoint_version": 1.0}, file)
    assert "checkpoint_version" in refusal(lambda: opened(tmp_path / "old"))


def test_a_runs_folder_names_its_iteration(shared: Path, tmp_path: Path) -> None:
    """An iteration guessed, where the folder does not say which is whole."""
    (tmp_path / "iter_0000003").symlink_to(shared / "megatron")
    assert "iter_0000003" in refusal(lambda: model_folder(str(tmp_path)))
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    latest.write_text("3")
    assert model_folder(str(tmp_path)) == tmp_path / "iter_0000003"
    latest.write_text("../3")
    assert str(latest) in refusal(lambda: model_folder(str(tmp_path)))


def test_a_megatron_checkpoint_generates_with_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    """No tokenizer in the folder, no end of text in the saved arguments: neither may be taken for granted."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    reference = random_llama(tmp_path / "hf", vocab_size=257, eos_token_id=256, bos_token_id=256)
    save_legacy(reference, read_model_config(tmp_path / "hf"), tmp_path / "model", 1, (6,), is_old=True)
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(["<|end|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(
        tmp_path / "hf"
    )
    overrides = {"model.path": str(tmp_path / "model"), "model.dtype": "float64"}
    assert "data.tokenizer" in refusal(lambda: EarlyExitLLM.from_config(load_config(None, overrides)))
    ours = EarlyExitLLM.from_config(load_config(None, {**overrides, "data.tokenizer": str(tmp_path / "hf")}))
    theirs = EarlyExitLLM.load(tmp_path / "hf", dtype="float64")
    said = [llm.generate(["def main():"], policy="full", max_new_tokens=12)[0].token_ids for llm in (ours, theirs)]
    assert said[0] == said[1] and ours.stop_token_ids == theirs.stop_token_ids == (256,)


def test_files_of_an_export_have_their_largest_size(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file closed only once it is too large: twice what a disk or a hub takes."""
    limit = 30_000
    monkeypatch.setattr(distcp_writer, "SHARD_BYTES", limit)
    write_megatron(load_config(None, {"model.path": str(shared / "hf")}), tmp_path / "export")
    files = list((tmp_path / "export").glob("*.distcp"))
    places = list(pickle.loads((tmp_path / "export" / ".metadata").read_bytes()).storage_data.values())
    assert len(files) > 5 and len({place.relative_path for place in places}) == len(files)
    for file in files:
        assert file.stat().st_size <= limit or sum(place.relative_path == file.name for place in places) == 1
    assert fingerprint(*opened(tmp_path / "export")[:2]) == fingerprint(*opened(shared / "hf")[:2])
