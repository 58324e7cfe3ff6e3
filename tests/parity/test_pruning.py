"""`ee-tuning prune` against transformers' own models with the same layers taken out of their lists."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import write_byte_tokenizer
from exits import write_exits
from random_models import FAMILIES, WITH_EXPERTS, random_model
from safetensors.torch import load_file

from ee_tuning import cli
from ee_tuning.artifact.exit_config import read_exit_config
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.export.check import exit_logits
from ee_tuning.parallel.topology import init_parallel

IDS = torch.tensor([[5, 17, 80, 3, 9, 41, 7, 7, 90, 12, 60, 33, 2, 51, 18, 64, 99, 1, 0, 44]])
DROPPED = (2, 4, 5)
SAMPLES = 6


def made(family: str, folder: Path, **changes: Any) -> Path:
    """model/ with a byte tokenizer, and text.txt of seven samples."""
    random_model(family, folder / "model", vocab_size=257, eos_token_id=256, bos_token_id=256, **changes)
    write_byte_tokenizer(folder / "model")
    words = "def leave(early): return [layer for layer in early if layer % 3]\n" * 14
    (folder / "text.txt").write_text(words)
    return folder


def prune(folder: Path, *words: str | Path, code: int = 0) -> None:
    text = ["--set", f"exits.profile_text={folder / 'text.txt'}", "--samples", str(SAMPLES)]
    picture = ["--picture", folder / "prune.png"]
    assert cli.main(["prune", "--model", str(folder / "model"), *text, *map(str, [*picture, *words])]) == code


def plain(folder: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    experts = json.loads((folder / "config.json").read_text())["model_type"] in WITH_EXPERTS
    more = {"experts_implementation": "eager"} if experts else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, trust_remote_code=False, **more
    ).eval()


def without(model: Any, dropped: tuple[int, ...]) -> Any:
    """transformers' model after its list of layers has lost some."""
    holder, name = (model.transformer, "h") if hasattr(model, "transformer") else (model.model, "layers")
    kept = [layer for number, layer in enumerate(getattr(holder, name), 1) if number not in dropped]
    setattr(holder, name, torch.nn.ModuleList(kept))
    model.config.num_hidden_layers = len(kept)
    return model


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:  # [b, s] -> [b, s, v]
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def ours(model: Path, exits: Path | None = None) -> dict[int, torch.Tensor]:
    keys = {"model.path": str(model), "exits.path": exits and str(exits), "model.dtype": "float64"}
    return exit_logits(load_for_generation(load_config(None, keys), init_parallel(ParallelSection())), IDS)


def samples(folder: Path) -> torch.Tensor:  # [b, s]
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(folder / "model")((folder / "text.txt").read_text())["input_ids"]
    return torch.tensor(ids[: SAMPLES * 128]).view(-1, 128)


def loss(model: Any, ids: torch.Tensor) -> float:
    said = logits(model, ids)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(said, ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_folder_is_the_model_without_the_layers(tmp_path, capsys, family):
    """A layer under the wrong number, experts where a dense layer was, a loss of another model than the one written."""
    folder = made(family, tmp_path)
    prune(folder, "--drop", ",".join(map(str, DROPPED)), "--dtype", "float64", "--output", folder / "pruned", "--json")
    told = json.loads(capsys.readouterr().out)
    wanted = without(plain(folder / "model"), DROPPED)
    torch.testing.assert_close(logits(plain(folder / "pruned")), logits(wanted), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(folder / "pruned")[3], logits(wanted)[0], rtol=0, atol=1e-5)
    held_out = samples(folder)[SAMPLES // 2 :]
    assert told["tokens"] == held_out[:, 1:].numel() and told["dropped"] == list(DROPPED)
    assert told["dropped_loss"] == pytest.approx(loss(wanted, held_out), abs=1e-5)
    assert told["loss"] == pytest.approx(loss(plain(folder / "model"), held_out), abs=1e-5)
    assert cli.main(["verify", str(folder / "pruned")]) == 0
    assert (folder / "prune.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made("llama", tmp_path_factory.mktemp("llama"))


def test_measures_choose_as_the_papers_say(llama, capsys):
    """Cosines in place of angles; all tokens in place of the last; the chosen block's neighbours; a loss on the samples
    by which it was chosen.
    """
    ids = samples(llama)
    first, second = ids[: SAMPLES // 2], ids[SAMPLES // 2 :]
    loss_without = cache(lambda dropped: loss(without(plain(llama / "model"), dropped), second))
    model = plain(llama / "model")
    last: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: last.append(arguments[0]))
    with torch.no_grad():
        states = [*model(first, output_hidden_states=True, use_cache=False).hidden_states[:-1], *last]
    cosine = torch.nn.functional.cosine_similarity
    turn = {
        block: (cosine(states[block[0] - 1][:, -1], states[block[-1]][:, -1], dim=-1).arccos() / math.pi).mean().item()
        for block in ((2, 3), (3, 4), (4, 5))
    }
    influence = {k: 1 - cosine(states[k - 1], states[k], dim=-1).mean().item() for k in range(2, 6)}
    losses = {block: loss(without(plain(llama / "model"), block), first) for block in turn}
    wanted = {
        "angular": min(turn, key=turn.__getitem__),
        "block-influence": tuple(sorted(sorted(influence, key=influence.__getitem__)[:2])),
        "perplexity": min(losses, key=losses.__getitem__),
        "deepest": (4, 5),
    }
    for measure, dropped in wanted.items():
        prune(llama, "--drop", "auto:2", "--measure", measure, "--dtype", "float64", "--dry-run", "--json")
        told = json.loads(capsys.readouterr().out)
        assert tuple(told["dropped"]) == dropped, measure
        for row in told["rows"] + told["deepest_but_last"]:
            assert row["loss"] == pytest.approx(loss_without(tuple(row["layers"])), abs=1e-5), (measure, row)
        assert [len(row["layers"]) for row in told["rows"]] == ([1, 2] if measure == "perplexity" else [1, 2, 3])


def test_a_dry_run_writes_no_model(llama, tmp_path, capsys):
    """A folder of gigabytes that the table was to spare."""
    prune(llama, "--drop", "auto:2", "--output", tmp_path / "pruned", "--dry-run")
    told = capsys.readouterr().out
    assert not (tmp_path / "pruned").exists() and "no model is written" in told
    assert told.splitlines()[0].startswith("dropped  by angular") and "deepest but the last" in told


def test_megatron_reads_the_pruned_model_back(llama, tmp_path):
    """Layers that are stacked as those of the whole model were."""
    prune(llama, "--drop", "2,4", "--format", "megatron", "--output", tmp_path / "pruned")
    wanted = logits(without(plain(llama / "model"), (2, 4)))[0]
    torch.testing.assert_close(ours(tmp_path / "pruned")[4], wanted, rtol=0, atol=1e-5)
    assert "without layers 2, 4" in (tmp_path / "pruned" / "README.md").read_text()
    assert cli.main(["verify", str(tmp_path / "pruned")]) == 0


def test_exits_move_with_the_layers(llama, tmp_path, capsys):
    """A head at its old number, behind other states; an mlp that replaces the MLP of a layer that is gone; two heads
    after one layer.
    """
    kinds = ["norm", "mlp", "norm", "adapter", "norm"]
    exits = write_exits(llama / "model", tmp_path / "exits", exit_layers=[1, 2, 3, 4, 5], architecture=kinds)
    words = ("--exits", exits, "--drop", "2,4-5", "--output", tmp_path / "pruned")
    prune(llama, *words)
    told = capsys.readouterr().out
    assert "exit after layer 3: after layer 2" in told and "exit after layer 2: left out, an mlp exit" in told
    moved = read_exit_config(tmp_path / "pruned-exits")
    assert (moved.exit_layers, moved.architecture, moved.adapter_rank) == ((1, 2), ("norm", "norm"), None)
    old, new = (load_file(each / "exit_heads.safetensors") for each in (exits, tmp_path / "pruned-exits"))
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name.replace("exits.2.", "exits.3.")]), name
    assert new.keys() == {f"exits.{layer}.{part}.weight" for layer in (1, 2) for part in ("norm", "output")}
    was, now = ours(llama / "model", exits), ours(tmp_path / "pruned", tmp_path / "pruned-exits")
    torch.testing.assert_close(now[1], was[1], rtol=0, atol=1e-9)  # nothing below it has gone
    with pytest.raises(AssertionError):
        torch.testing.assert_close(now[2], was[3])
    prune(llama, "--exits", exits, "--drop", "3", "--output", tmp_path / "three")
    assert read_exit_config(tmp_path / "three-exits").exit_layers == (1, 2, 3, 4)
    assert read_exit_config(tmp_path / "three-exits").architecture == ("norm", "mlp", "adapter", "norm")


def test_an_exit_behind_a_dropped_layer_reads_the_layer_below(llama, tmp_path):
    """A head that is lost though the states it reads are there."""
    exits = write_exits(llama / "model", tmp_path / "exits", exit_layers=[4], architecture="norm")
    prune(llama, "--exits", exits, "--drop", "3-4", "--output", tmp_path / "pruned", "--exits-output", tmp_path / "own")
    assert read_exit_config(tmp_path / "own").exit_layers == (2,)
    at_two = write_exits(llama / "model", tmp_path / "two", exit_layers=[2], architecture="norm")
    heads = load_file(exits / "exit_heads.safetensors")
    same = {name.replace("exits.4.", "exits.2."): tensor for name, tensor in heads.items()}
    from safetensors.torch import save_file

    from ee_tuning.storage.manifest import write_manifest

    save_file(same, at_two / "exit_heads.safetensors", metadata={"format": "pt"})
    write_manifest(at_two)
    found = ours(tmp_path / "pruned", tmp_path / "own")[2]
    torch.testing.assert_close(found, ours(llama / "model", at_two)[2], rtol=0, atol=1e-9)


def test_a_drafting_head_moves_the_layers_it_reads(llama, tmp_path):
    """States of other layers than the head was tuned on."""
    keys = {"exit_layers": [6], "architecture": "eagle3", "aux_layers": [1, 3, 5], "init": "copy"}
    exits = write_exits(llama / "model", tmp_path / "exits", **keys)
    prune(llama, "--exits", exits, "--drop", "2,4", "--output", tmp_path / "pruned")
    moved = read_exit_config(tmp_path / "pruned-exits")
    assert moved.exit_layers == (4,) and moved.draft is not None and moved.draft.aux_layers == (1, 2, 3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--drop", "1"], ["first layer and the last", "got 1", "2..5"]),
        (["--drop", "6"], ["first layer and the last", "got 6"]),
        (["--drop", "3,7"], ["1..6", "got 7"]),
        (["--drop", "0"], ["1..6", "got 0"]),
        (["--drop", "2-5,9"], ["1..6", "got 9"]),
        (["--drop", "auto:5"], ["at most 4", "got 5"]),
        (["--drop", "auto:0"], ["auto:N", "'auto:0'"]),
        (["--drop", "auto"], ["auto:N", "'auto'"]),
        (["--drop", "5-3"], ["'5-3'"]),
        (["--drop", "three"], ["'three'"]),
        (["--drop", ","], ["at least one"]),
        (["--drop", "3,3"], ["3 twice"]),
        (["--drop", "auto:2", "--samples", "1"], ["--samples", "got 1"]),
        (["--drop", "auto:2", "--samples", "1000000", "--exits-output", "x"], ["--exits-output"]),
        (["--drop", "auto:2", "--model", "nowhere"], ["nowhere"]),
        (["--drop", "auto:2", "--data", "nowhere.txt"], ["nowhere.txt"]),
    ],
    ids=lambda words: " ".join(words) if words[0] == "--drop" else "",
)
def test_what_can_not_be_pruned_is_refused_in_one_line(llama, tmp_path, capsys, words, named):
    """A traceback, or a model of nothing."""
    prune(llama, *words, "--output", tmp_path / "pruned", code=2)
    error = capsys.readouterr().err
    assert all(word in error for word in named) and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_exist_stay(llama, tmp_path, capsys):
    """A model that is measured for minutes and then refused, or one that is overwritten unasked."""
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "mine").write_text("mine")
    for words in ([], ["--overwrite"]):
        prune(llama, "--drop", "auto:2", "--output", tmp_path / "pruned", *words, code=2)
        assert "pruned" in capsys.readouterr().err
    prune(llama, "--drop", "auto:2", "--output", llama / "model" / "in", code=2)
    exits = write_exits(llama / "model", tmp_path / "exits", architecture="mlp", exit_layers=[3])
    prune(llama, "--exits", exits, "--drop", "3", "--output", tmp_path / "gone", code=2)
    assert "no exit of model can go along" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exits", "pruned"]
