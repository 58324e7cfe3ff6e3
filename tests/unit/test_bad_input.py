"""Bad input ends in one line that names rule, value and remedy, and leaves nothing half-written."""

import json
import math
import shutil
from pathlib import Path

import pytest
from exits import write_exits
from random_models import LLAMA_SHAPE, random_llama

from ee_tuning.artifact.convert import convert
from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.model_config.config import model_config_from_hf
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.command import tune_within


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a byte tokenizer, exits/ bound to it, other/ of the same shape, text.txt"""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("shared")
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(["<|end|>"])
    for name, seed in (("model", 0), ("other", 1)):
        random_llama(folder / name, seed=seed, vocab_size=257, eos_token_id=256, bos_token_id=256)
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(
            folder / name
        )
    write_exits(folder / "model", folder / "exits")
    (folder / "text.txt").write_text("early exits leave early. " * 400)
    (folder / "more.txt").write_text("deep layers rest. " * 400)
    return folder


def tuning_job(shared: Path, run: Path, **overrides: object) -> Config:
    return load_config(
        None,
        {
            "model.path": str(shared / "model"),
            "exits.path": str(shared / "exits"),
            "tuning.run_folder": str(run),
            "data.paths": [str(shared / "text.txt"), str(shared / "more.txt")],
            "tuning.micro_batch_size": 2,
            "tuning.global_batch_size": 2,
            "tuning.seq_length": 64,
            "tuning.train_iters": 1,
            **overrides,
        },
    )


def complaint(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    return message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"exits.exit_layers": [2, 7]}, ["1..6", "7"]),
        ({"exits.exit_layers": [0, 2]}, ["1..6", "0"]),
        ({"exits.exit_layers": [4, 2]}, ["increase", "4,2", "2,4"]),
        ({"exits.exit_layers": []}, ["at least one", "--exit-layers"]),
        ({"parallel.tensor_model_parallel_size": 3}, ["tensor_model_parallel_size", "3", "divi"]),
        ({"parallel.pipeline_model_parallel_size": 2}, ["2", "1", "torchrun"]),
        ({"parallel.pipeline_model_parallel_size": 9}, ["6 layers", "9"]),
        ({"parallel.tensor_model_parallel_size": 0}, ["at least 1", "0"]),
        ({"model.path": "/no/such/model"}, ["/no/such/model", "folder"]),
        ({"exits.output": "shared"}, ["exits.output = shared", "tune", "tied"]),
    ],
)
def test_convert_refuses(shared, tmp_path, overrides, words):
    """A wrong word that surfaces as a traceback from inside a library, after a folder was made."""
    config = load_config(None, {"model.path": str(shared / "model"), "exits.exit_layers": [2, 4], **overrides})
    with pytest.raises(InputError) as error:
        convert(config, tmp_path / "out")
    assert all(word in complaint(error) for word in words), complaint(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": "two"},
        {"num_key_value_heads": 3},
        {"head_dim": 9},
        {"rope_scaling": [1]},
        {"rms_norm_eps": "small"},
        {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
        {"rope_parameters": {"rope_type": "linear", "factor": None}},
        {"rope_parameters": {"rope_type": "su", "factor": 2}},
        {"vocab_size": -1},
        {"model_type": "other"},
        {"mlp_bias": True},
        None,
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_its_file(shared, tmp_path, changes):
    """A traceback from a conversion deep inside, for a file that was edited by hand."""
    model = shutil.copytree(shared / "model", tmp_path / "model")
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps([] if changes is None else {**raw, **changes}))
    with pytest.raises(InputError) as error:
        convert(load_config(None, {"model.path": str(model), "exits.exit_layers": [2]}), tmp_path / "out")
    assert "config.json" in complaint(error)
    assert not (tmp_path / "out").exists()


NO_SIZE = (0, -2, True, 2.5, 10**30, "2", [2], {})
NO_TRUTH = ("false", 0, 1, [], {})
NO_NUMBER = (-1.0, True, math.inf, math.nan, 10**400, "small", [1.0], {"a": 1})


@pytest.mark.parametrize(
    ("key", "kind", "values"),
    [
        ("num_key_value_heads", None, NO_SIZE),
        ("head_dim", None, NO_SIZE),
        ("intermediate_size", None, NO_SIZE),
        ("rms_norm_eps", None, NO_NUMBER),
        ("initializer_range", None, NO_NUMBER),
        ("tie_word_embeddings", None, NO_TRUTH),
        ("attention_bias", None, NO_TRUTH),
        ("truncate", "yarn", NO_TRUTH),
        ("rope_parameters", None, (True, 5, "default", [1])),
        ("rope_scaling", None, (True, 5, "default", [1])),
        ("rope_theta", "default", NO_NUMBER),
        ("factor", "linear", (*NO_NUMBER, 0)),
        ("original_max_position_embeddings", "yarn", (-2, True, 0.5, 10**30, "2", [2])),
        ("beta_fast", "yarn", NO_NUMBER),
        ("attention_factor", "yarn", NO_NUMBER),
        ("high_freq_factor", "llama3", NO_NUMBER),
        ("short_factor", "longrope", (5, "ab", [1.0, "x"], [-1.0])),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_by_its_key(key, kind, values):
    """A message about Python's types that names no key; a head's width of 2.5, or less than no heads, taken as such."""
    rope = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    lists = {"short_factor": [1.0] * 5, "long_factor": [1.0] * 5}
    right = {**LLAMA_SHAPE, "model_type": "llama", "rope_parameters": {**rope, **lists} if kind else None}
    model_config_from_hf(right, Path("config.json"))
    for value in values:
        changed = {"rope_parameters": {**right["rope_parameters"], key: value}} if kind else {key: value}
        with pytest.raises(InputError) as error:
            model_config_from_hf({**right, **changed}, Path("config.json"))
        assert f"config.json: {key} must be " in complaint(error) and len(complaint(error)) < 200, complaint(error)


@pytest.mark.parametrize("damage", ["truncated", "header", "missing"])
def test_a_damaged_model_is_refused_by_its_file(shared, tmp_path, damage):
    """Half a download that converts to garbage."""
    model = shutil.copytree(shared / "model", tmp_path / "model")
    file = model / "model.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "header":
        file.write_bytes(content[:20] + b"\xff\xff" + content[22:])
    else:
        file.unlink()
    with pytest.raises(InputError) as error:
        convert(load_config(None, {"model.path": str(model), "exits.exit_layers": [2]}), tmp_path / "out")
    assert "model.safetensors" in complaint(error)
    assert not (tmp_path / "out").exists()


def test_an_altered_artifact_is_refused(shared, tmp_path):
    """A flipped byte of data that safetensors reads without a word."""
    exits = shutil.copytree(shared / "exits", tmp_path / "exits")
    content = bytearray((exits / "exit_heads.safetensors").read_bytes())
    content[-5] ^= 1
    (exits / "exit_heads.safetensors").write_bytes(content)
    with pytest.raises(InputError) as error:
        EarlyExitLLM.load(shared / "model", exits)
    assert "exit_heads.safetensors" in complaint(error)


def test_exits_of_another_backbone_are_refused(shared):
    """Heads on a model of the same shape load well and talk nonsense."""
    with pytest.raises(InputError) as error:
        EarlyExitLLM.load(shared / "other", shared / "exits")
    assert "fingerprint" in complaint(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": "high"}, ["generation.threshold", "number", "high"]),
        ({"threshold": float("nan")}, ["generation.threshold", "nan"]),
        ({"threshold": -0.5}, ["at least 0", "-0.5"]),
        ({"policy": "fixed", "exit_layer": 3}, ["2, 4", "3"]),
        ({"policy": "fixed"}, ["--exit-layer", "2, 4"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "at least 1", "0"]),
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"top_p": 0}, ["top_p", "0"]),
        ({"stop": [""]}, ["stop", "empty"]),
        ({"treshold": 0.5}, ["treshold", "threshold"]),
    ],
)
def test_generate_refuses(shared, options, words):
    """An option that is ignored, or fails after the first token."""
    llm = EarlyExitLLM.load(shared / "model", shared / "exits")
    with pytest.raises(InputError) as error:
        llm.generate(["a prompt"], **options)
    assert all(word in complaint(error) for word in words), complaint(error)


@pytest.mark.slow
def test_a_prompt_as_long_as_the_context_is_refused_and_one_less_answers(shared):
    """A prompt that runs past the positions the model was made for."""
    llm = EarlyExitLLM.load(shared / "model", shared / "exits")
    for length in (128, 129):
        with pytest.raises(InputError) as error:
            llm.generate(["x" * length])
        assert "128" in complaint(error) and str(length) in complaint(error)
    [last] = llm.generate(["x" * 127], ignore_eos=True)
    assert len(last.token_ids) == 1 and last.finish_reason == "length"
    assert llm.generate([]) == []
    [empty] = llm.generate([""], max_new_tokens=3, ignore_eos=True)
    assert len(empty.token_ids) == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data.paths": []}, ["data.paths"]),
        ({"data.paths": ["EMPTY"]}, ["empty"]),
        ({"data.paths": ["/no/such/text"]}, ["/no/such/text"]),
        ({"tuning.seq_length": 129}, ["128", "129"]),
        ({"tuning.global_batch_size": 3}, ["multiple", "3"]),
        ({"tuning.micro_batch_size": 0}, ["micro_batch_size", "0"]),
        ({"tuning.loss_weights": [1.0]}, ["loss_weights", "2"]),
        ({"tuning.lr": -1}, ["lr", "-1"]),
        ({"tuning.train_iters": 0}, ["train_iters", "0"]),
        ({"tuning.trainable": "everything"}, ["tuning.trainable", "last:K", "everything"]),
        ({"tuning.trainable": "last:0"}, ["tuning.trainable", "last:0"]),
        ({"tuning.trainable": "last:7"}, ["last:7", "6 layers"]),
        ({"tuning.trainable": "lora", "tuning.lora_targets": ["query"]}, ["lora_targets", "q_proj", "query", "none"]),
        ({"tuning.trainable": "lora", "tuning.lora_rank": 0}, ["lora_rank", "0"]),
        ({"tuning.trainable": "mlp", "tuning.backbone_weights": "int8"}, ["quantizes", "native"]),
        ({"tuning.trainable": "mlp", "tuning.divide_by_token_weights": True}, ["divide_by_token_weights"]),
        ({"tuning.trainable": "mlp", "tuning.final_loss": ["forward_kl"]}, ["final_loss", "teacher_model"]),
        (
            {"tuning.trainable": "all", "exits.output": "shared"},
            ["exits.output = shared", "exits.path", "--exit-layers"],
        ),
        (
            {"exits.path": None, "exits.exit_layers": [2], "exits.output": "shared"},
            ["exits.output = shared", "trainable"],
        ),
        (
            {"exits.path": None, "exits.exit_layers": [2], "exits.output": "tied", "tuning.trainable": "all"},
            ["exits.output = tied", "shared"],
        ),
        (
            {"tuning.trainable": "all", "tuning.teacher": "hidden", "tuning.loss": ["forward_kl"]},
            ["tuning.teacher = hidden", "top_k"],
        ),
        ({"tuning.depth_sampling": "random"}, ["depth_sampling", "shared", "untied"]),
        ({"tuning.teacher_model": "/no/such/model"}, ["teacher_model", "trainable"]),
        ({"tuning.trainable": "mlp", "tuning.teacher_model": "/no/such/model"}, ["/no/such/model"]),
        ({"tuning.trainable": "mlp", "model.adapter": "/no/such/adapter"}, ["model.adapter", "/no/such/adapter"]),
        ({"model.adapter": "/no/such/adapter"}, ["model.adapter", "adapter_config.json"]),
    ],
)
def test_tune_refuses(shared, tmp_path, overrides, words):
    """An hour of waiting before a run that can not be."""
    (tmp_path / "empty.txt").write_text("")
    overrides = {
        key: [str(tmp_path / "empty.txt")] if value == ["EMPTY"] else value for key, value in overrides.items()
    }
    config = tuning_job(shared, tmp_path / "run", **overrides)
    with pytest.raises(InputError) as error:
        tune_within(config, init_parallel(config.parallel))
    assert all(word in complaint(error) for word in words), complaint(error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["size", "tokens"])
def test_a_teacher_of_another_vocabulary_is_refused(shared, tmp_path, case):
    """A student that learns to say other words."""
    teacher = tmp_path / "teacher"
    random_llama(teacher, vocab_size=256 if case == "size" else 257)
    if case == "tokens":
        tree = json.loads((shared / "model" / "tokenizer.json").read_text())
        tree["model"]["vocab"] = {token: 255 - index for token, index in tree["model"]["vocab"].items()}
        (teacher / "tokenizer.json").write_text(json.dumps(tree))
    overrides = {"tuning.trainable": "mlp", "tuning.teacher_model": str(teacher)}
    config = tuning_job(shared, tmp_path / "run", **overrides)
    with pytest.raises(InputError) as error:
        tune_within(config, init_parallel(config.parallel))
    assert all(word in complaint(error) for word in ("vocabulary", "teacher_model", str(teacher)))
    assert not (tmp_path / "run").exists()


def test_a_refused_resume_leaves_the_run_as_it_is(shared, tmp_path):
    """A job that can not go on overwrites the config.yaml of the run that could."""
    run = tmp_path / "run"
    config = tuning_job(shared, run)
    tune_within(config, init_parallel(config.parallel))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert run / "config.yaml" in before and load_config(run / "config.yaml") == config
    other = tuning_job(shared, run, **{"tuning.resume": True, "tuning.seed": 7, "tuning.train_iters": 2})
    with pytest.raises(InputError) as error:
        tune_within(other, init_parallel(other.parallel))
    assert "seed" in complaint(error)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_finished_run_that_is_started_again_needs_no_records(shared, tmp_path, capsys):
    """A traceback of the plots in place of the word that the exits are written."""
    config = tuning_job(shared, tmp_path / "run")
    topology = init_parallel(config.parallel)
    assert tune_within(config, topology)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert tune_within(config, topology) and f"wrote {tmp_path / 'run' / 'exit_heads'}" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["a stranger's file", "the exits that are tuned", "a file"])
def test_a_run_folder_that_can_not_take_the_tuned_exits_is_refused_before_anything_runs(
    shared, tmp_path, monkeypatch, case
):
    """A finished run that can not be written, or one that replaces the exits it was given."""
    run, overrides = tmp_path / "run", {}
    if case == "a stranger's file":
        (run / "exit_heads").mkdir(parents=True)
        (run / "exit_heads" / "thesis.tex").touch()
        words = ["exit_heads", "none"]
    elif case == "the exits that are tuned":
        shutil.copytree(shared / "exits", run / "exit_heads")
        (tmp_path / "link").symlink_to(run)
        overrides, words = (
            {"exits.path": str(tmp_path / "link" / "exit_heads")},
            ["exits.path", "elsewhere", "tuning.run_folder"],
        )
    else:
        run.touch()
        words = ["run_folder", "a file"]
    monkeypatch.setattr(
        "ee_tuning.tuning.command.load_for_tuning", lambda *_: pytest.fail("loaded before it was refused")
    )
    before = sorted(tmp_path.rglob("*"))
    config = tuning_job(shared, run, **overrides)
    with pytest.raises(InputError) as error:
        tune_within(config, init_parallel(config.parallel))
    assert all(word in complaint(error) for word in words), complaint(error)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_config_file_with_a_wrong_key_names_the_right_one(tmp_path):
    """A misspelt key that is ignored."""
    (tmp_path / "job.yaml").write_text(json.dumps({"tuning": {"train_iter": 5}}))
    with pytest.raises(InputError) as error:
        load_config(tmp_path / "job.yaml")
    assert "train_iters" in complaint(error) and "job.yaml" in complaint(error)
