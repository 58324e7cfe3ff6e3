"""Weights that were trained for a model: written as peft reads them, and put over the model when it is read."""

import json
from pathlib import Path

import pytest
import torch
from random_models import random_llama
from safetensors.torch import load_file, save_file
from tuning_jobs import configure, make_tuner

from ee_tuning.artifact.load import load_for_generation
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.formats import open_model
from ee_tuning.checkpoint.trained_names import half_of
from ee_tuning.config import Config, ModelSection, ParallelSection, replace
from ee_tuning.errors import InputError
from ee_tuning.export.check import exit_logits
from ee_tuning.export.export_draft import export_draft
from ee_tuning.export.export_huggingface import export_huggingface
from ee_tuning.parallel.topology import init_parallel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama."""
    folder = tmp_path_factory.mktemp("llama")
    random_llama(folder)
    return folder


@pytest.fixture(scope="module", params=["lora", "mlp", "last:2", "backbone"])
def trained(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A job whose run has written adapter/ and exit_heads/."""
    run = tmp_path_factory.mktemp("run")
    config = configure(model, run, dtype="float32", trainable=request.param, lora_rank=3, eval_iters=0, train_iters=2)
    tuner = make_tuner(config)
    assert tuner.run()
    tuner.save_exit_heads(run / "exit_heads", tuner.save_trained_weights(run / "adapter"))
    return config


def adapted(config: Config) -> ModelSection:
    return replace(config, model={"adapter": f"{config.tuning.run_folder}/adapter"}).model


def test_an_export_with_an_adapter_is_the_plain_merged_model(trained: Config, tmp_path: Path) -> None:
    """Trained weights left out, put beside the wrong matrix, or a fingerprint that the merged folder does not have."""
    run = Path(trained.tuning.run_folder)
    export_huggingface(replace(trained, model={"adapter": str(run / "adapter")}), tmp_path / "merged")
    merged, own = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", Path(trained.model.path))
    )
    changed = {name for name in own if not torch.equal(merged[name], own[name])}
    parts = {
        "lora": lambda name: "_proj" in name,
        "mlp": lambda name: ".mlp." in name,
        "last:2": lambda name: name.startswith(("model.layers.4.", "model.layers.5.", "model.norm.")),
        "backbone": lambda name: name.startswith(("model.layers.", "model.norm.")),
    }
    assert changed == {name for name in own if parts[trained.tuning.trainable](name)}
    with (
        open_model(adapted(trained)).source as one,
        open_model(ModelSection(path=str(tmp_path / "merged"))).source as two,
    ):
        config = open_model(adapted(trained)).config
        assert fingerprint(one, config) == fingerprint(two, config)
        for name, whole in merged.items():
            assert torch.equal(one.rows(name, 0, len(whole)), whole)
            if whole.dim() == 2:
                assert torch.equal(one.columns(name, 3, 11), whole[:, 3:11])


def test_exits_are_bound_to_the_model_with_its_adapter(trained: Config) -> None:
    """Heads that were tuned with trained layers, decoded over the layers as they were."""
    run = Path(trained.tuning.run_folder)
    config, topology = replace(trained, exits={"path": str(run / "exit_heads")}), init_parallel(ParallelSection())
    with pytest.raises(InputError, match="fingerprint"):
        load_for_generation(config, topology)
    assert load_for_generation(replace(config, model={"adapter": str(run / "adapter")}), topology).exits


def test_what_a_run_says_is_what_the_merged_model_loses(trained: Config, tmp_path: Path) -> None:
    """Weights that are written before the last step, or in another order than they are read."""
    import transformers

    run = Path(trained.tuning.run_folder)
    tuner = make_tuner(replace(trained, tuning={"run_folder": str(tmp_path / "again")}))
    assert tuner.run()
    export_huggingface(replace(trained, model={"adapter": str(run / "adapter")}), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        hidden, _ = tuner._model.run_layers(tuner._model.embed(tokens))
        own = tuner._model.final_hidden(hidden) @ tuner._model.backbone.output_layer.weight.t()
        torch.testing.assert_close(own[:, 0, :101], merged(tokens).logits[0], rtol=1e-4, atol=1e-4)


def test_peft_loads_and_merges_the_adapter(model: Path, trained: Config, tmp_path: Path) -> None:
    """Names, orientation or scale that peft reads as something else."""
    peft = pytest.importorskip("peft")
    import transformers

    if trained.tuning.trainable != "lora":
        pytest.skip("no adapter of peft's")
    run = Path(trained.tuning.run_folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    merged = peft.PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().state_dict()
    with open_model(adapted(trained)).source as source:
        for name, whole in merged.items():
            torch.testing.assert_close(source.rows(name, 0, len(whole)), whole, rtol=1e-6, atol=1e-7, msg=name)


def test_half_of_each_kind_is_trained_and_the_rest_keeps_its_bits(model: Path, tmp_path: Path) -> None:
    """A half that is drawn over all matrices at once; frozen rows of a fused matrix that moments move; a step that
    trains the former half.
    """
    config = configure(
        model, tmp_path / "run", dtype="float32", trainable="half", half_steps=1, train_iters=1, eval_iters=0
    )
    tuner = make_tuner(config)
    shape, seed = tuner._model.config, config.tuning.seed
    first, second = (half_of(shape, seed, choice) for choice in (0, 1))
    assert first != second and first == half_of(shape, seed, 0)
    for chosen in (first, second):
        layers = [{name for name in chosen if f"layers.{layer}." in name} for layer in range(6)]
        assert [sum(".self_attn." in name for name in each) for each in layers] == [2] * 6
        assert [sum("norm" in name for name in each) for each in layers] == [1] * 6
        assert sorted(sum(".mlp." in name for name in each) for each in layers) == [1, 1, 1, 2, 2, 2]
    own = load_file(model / "model.safetensors")
    for steps, trained in ((1, first), (2, first | second)):
        tuner = make_tuner(replace(config, tuning={"train_iters": steps}))
        tuner.resume()
        assert tuner.run()
        tuner.save_trained_weights(tmp_path / f"after{steps}")
        found = load_file(tmp_path / f"after{steps}" / "trained.safetensors")
        assert {name for name in found if not torch.equal(found[name], own[name])} == trained


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type", "IA3"]),
        ({"use_dora": True}, ["use_dora"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"r": 0}, ["adapter_config.json"]),
        ({}, ["q_proj", "no matrix"]),
        (None, ["adapter_config.json"]),
    ],
)
def test_an_adapter_that_would_be_read_wrongly_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, object] | None, words: list[str]
) -> None:
    """A kind of adapter whose sum is another one, or one of another model."""
    tree = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **(changes or {})}
    (tmp_path / "adapter_config.json").write_text("{" if changes is None else json.dumps(tree))
    name = "base_model.model.model.layers.9.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 48), name.format("B"): torch.ones(40, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(InputError) as error:
        open_model(ModelSection(path=str(model), adapter=str(tmp_path)))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_job_without_exits_trains_the_model_alone(model: Path, tmp_path: Path) -> None:
    """Exits that a healing run must make and throw away."""
    config = configure(model, tmp_path / "run", exits=(), trainable="mlp", eval_iters=1, train_iters=2)
    tuner = make_tuner(config)
    assert tuner.run() and not tuner.exits
    tuner.save_trained_weights(tmp_path / "run" / "adapter")
    assert len(load_file(tmp_path / "run" / "adapter" / "trained.safetensors")) == 18
    with pytest.raises(InputError, match="final_loss_weight"):
        make_tuner(replace(config, tuning={"final_loss_weight": 0.0}))


@pytest.mark.parametrize("ties", [False, True])
def test_a_depth_that_shares_the_final_head_is_the_plain_model_of_its_layers(ties: bool, tmp_path: Path) -> None:
    """Norm or output matrix as they were before the training, in an exit of the artifact or in its export; one of two
    tied matrices.
    """
    import transformers

    run, tokens = tmp_path / "run", torch.arange(12)[None]
    random_llama(tmp_path / "model", tie_word_embeddings=ties)
    config = configure(tmp_path / "model", run, dtype="float32", trainable="all", eval_iters=0, train_iters=2)
    tuner = make_tuner(replace(config, exits={"output": "shared"}))
    assert tuner.run() and not tuner.exits
    tuner.save_exit_heads(run / "exit_heads", tuner.save_trained_weights(run / "adapter"))
    moved = load_file(run / "adapter" / "trained.safetensors")
    own = load_file(tmp_path / "model" / "model.safetensors")
    assert moved.keys() == own.keys() and not any(torch.equal(moved[name], own[name]) for name in own)
    config = replace(config, model={"adapter": str(run / "adapter")}, exits={"path": str(run / "exit_heads")})
    export_draft(config, tmp_path / "plain", 2, kind="pruned")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    said = exit_logits(load_for_generation(config, init_parallel(ParallelSection())), tokens)
    with torch.no_grad():
        torch.testing.assert_close(said[2], plain(tokens).logits[0].double(), rtol=1e-5, atol=1e-5)
        _, inputs = tuner._model.run_layers(tuner._model.embed(tokens))
        trained = tuner._model.exit_head(2)(inputs[2], torch.nn.functional.linear)[:, 0, :101]
    torch.testing.assert_close(said[2][:, :101], trained.double(), rtol=1e-5, atol=1e-5)


def test_a_teacher_model_is_matched(model: Path, tmp_path: Path) -> None:
    """A student that learns from itself, or from the teacher's states in its own output matrix."""
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    random_llama(student, num_hidden_layers=2, seed=3)
    random_llama(teacher, num_hidden_layers=3, seed=3, hidden_size=32, intermediate_size=24)
    keys = {
        "trainable": "backbone",
        "teacher_model": str(teacher),
        "lr": 3e-2,
        "min_lr": 3e-3,
        "train_iters": 40,
        "clip_grad": 1.0,
    }
    config = configure(student, tmp_path / "run", exits=(), dtype="float32", eval_interval=0, **keys)
    tuner = make_tuner(config)
    assert tuner.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line["loss"]["2"] for line in lines if line["kind"] == "train"]
    assert trained[-1] < 0.7 * trained[0]
