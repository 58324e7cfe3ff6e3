"""What is advised is computed; its arithmetic is checked against a second way to the same numbers."""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ee_tuning import cli
from ee_tuning.artifact.shapes import with_seq_length
from ee_tuning.checkpoint.model_size import parameters_by_part
from ee_tuning.config import Config, ModelSection, TuningSection, load_config, replace
from ee_tuning.model_config.config import ModelConfig, read_model_config
from ee_tuning.parallel.topology import destroy_parallel
from ee_tuning.planning import fewest_gpus, plan
from ee_tuning.planning.advice_commands import commands_of, run_of, writes_prompts
from ee_tuning.planning.advise import (
    FORMULA,
    Way,
    gpu_hours,
    read_sizes,
    speed_up_by_drafts,
    speed_up_by_threshold,
)
from ee_tuning.planning.advise import ways as ways_by_commands
from ee_tuning.planning.fewest_gpus import FewestGpus, Split
from ee_tuning.planning.gpus import GPUS, Gpu
from ee_tuning.planning.plan import Cluster, TuningPlan, make_plan

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def no_world():
    """Dry runs imagine a world, and another test's may be left."""
    if torch.distributed.is_initialized():
        destroy_parallel()


def model(name: str) -> ModelConfig:
    return read_model_config(EXAMPLES / name)


def ways(
    shape: ModelConfig, name: str, ttt_steps: int, *, loads_in_engines: bool = True, gpu: Gpu | None = None
) -> list[Way]:
    """Every way, for 100 million tokens, and in one process where no GPU is given."""
    config = load_config(None, {"model.path": name})
    known = with_seq_length(config, shape)
    gpus = FewestGpus(known, shape, gpu) if gpu else None
    run = run_of(known.tuning, 100_000_000)
    commands = commands_of(config.model, config.tuning, run, loads_in_engines=loads_in_engines, gpus=gpus)
    return ways_by_commands(shape, commands, ttt_steps)


def test_what_a_token_reads_is_what_transformers_counts():
    """A tied embedding read twice or never, a layer too many."""
    import transformers

    for name in ("llama-3.1-8b", "tiny-python-llama"):
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(EXAMPLES / name)
            stock = transformers.AutoModelForCausalLM.from_config(config)
        layers = sum(parameter.numel() for parameter in stock.model.layers.parameters())
        sizes = read_sizes(model(name))
        assert sizes.whole == layers + stock.lm_head.weight.numel() and sum(sizes.layers) == layers


def mixtral() -> ModelConfig:
    """Eight experts, two a token, in every layer of the shape of Llama 3.1 8B, which is Mixtral's."""
    dense = model("llama-3.1-8b")
    return dataclasses.replace(
        dense, family="mixtral", num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=dense.ffn_hidden_size
    )


def test_experts_that_are_not_asked_are_not_read():
    """A mixture of experts that looks as slow as all its weights."""
    dense, mixture = model("llama-3.1-8b"), mixtral()
    router, mlp = 8 * dense.hidden_size, 3 * dense.hidden_size * dense.ffn_hidden_size
    assert read_sizes(mixture).layers[0] == read_sizes(dense).layers[0] + mlp + router


def test_speed_ups_are_those_of_simulated_rounds():
    """A formula that counts the model's own token of a round twice or not at all."""
    generator = torch.Generator().manual_seed(0)
    for right, step, k in ((0.5, 0.1, 2), (0.8, 0.05, 8), (0.9, 0.3, 3)):
        runs = (torch.rand(200_000, k, generator=generator) < right).cumprod(1).sum(1)
        simulated = (1 + runs.double().mean().item()) / (1 + k * step)
        assert simulated <= speed_up_by_drafts(right, step) + 0.01
    best = max((1 + 0.7 + 0.49 + 0.343) / 1.3, (1 + 0.7 + 0.49) / 1.2, 1.7 / 1.1, sum(0.7**i for i in range(5)) / 1.4)
    assert speed_up_by_drafts(0.7, 0.1) >= best
    assert speed_up_by_drafts(0.2, 0.3) == 1.0, "no draft is made where none pays"
    assert speed_up_by_drafts(0.7, 0.1, (1.0, 1.0), 0.05) == pytest.approx((1 + 0.7 + 0.49) / 1.25)
    assert speed_up_by_threshold(0.5, [0.5, 0.75], 0.1) == pytest.approx(1 / (0.5 * 0.625 + 0.5 * 1.1))
    assert gpu_hours(6e12, 3600, 1000, 0.5) == pytest.approx(6 * 2 / 1000)


# Llama 3.1 8B: 32 layers, h = 4096, 32 heads and 8 groups of 128, inner width 14,336, 128,256 tokens.
H, OUTPUT, MLP = 4096, 128_256 * 4096, 3 * 4096 * 14_336
ATTENTION = 2 * H * H + 2 * 1024 * H  # queries and output; keys and values of an eighth of 8192 columns
NORMS = 2 * H


def test_tuning_threshold_exits_costs_what_a_hand_computes():
    """A tied output matrix through which the exits' forward and backward passes are free, and a fit's linear map that
    is neither trained nor read.
    """
    tied, untied, shortlist = ways(model("llama-3.1-8b"), "MODEL", 3)[:3]
    runs = 2 * 24 * (ATTENTION + MLP + NORMS)
    mapped = H * H + H  # the linear map of a fit and its bias
    assert tied.operations == runs + 2 * (6 * (mapped + H) + 4 * OUTPUT)
    assert untied.operations == runs + 2 * 6 * (H + OUTPUT)
    assert shortlist.operations == runs + 2 * 6 * (H + (16_384 + 1) * H)
    assert tied.trained == tied.added == 2 * (mapped + H) and untied.trained == 2 * (H + OUTPUT)
    whole = 32 * (ATTENTION + MLP + NORMS) + OUTPUT
    assert tied.step == pytest.approx(2 * (mapped + H + OUTPUT) / whole)
    assert gpu_hours(tied.operations, 1e8, 989, 0.5) == pytest.approx(0.84, abs=0.005)


def test_commands_for_engines_name_a_folder_that_they_load():
    """A GGUF file or a Megatron checkpoint as vLLM's model, and as the verifier that a drafting head's folder names."""
    for way in ways(model("llama-3.1-8b"), "model.gguf", 3, loads_in_engines=False):
        serving = [line for line in way.commands if line.startswith("vllm serve") or "speculators" in line]
        assert not any("model.gguf" in line for line in serving)
        if serving:
            assert "ee-tuning export --format hf --model model.gguf --output MODEL_FOLDER" in way.commands
    plain = [line for way in ways(model("llama-3.1-8b"), "org/name", 3) for line in way.commands]
    assert any(line.startswith("vllm serve org/name --speculative-config") for line in plain)
    assert not any("MODEL_FOLDER" in line for line in plain)


def test_tuning_drafts_costs_what_a_hand_computes():
    """A fusing map that is charged for every unrolled step, though it runs once, and one that no round is charged
    for.
    """
    exit_, exported, eagle = ways(model("llama-3.1-8b"), "MODEL", 3)[-3:]
    layer = ATTENTION + MLP + NORMS
    whole = 32 * layer + OUTPUT
    assert exit_.operations == exported.operations == 2 * whole + 6 * (layer + H + OUTPUT)
    fused, qkv = 3 * H * H, 2 * H * (4096 + 2 * 1024)
    unrolled = qkv + H * H + MLP + 4 * H + 32_000 * H
    assert eagle.trained == fused + unrolled
    assert eagle.operations == 2 * whole + 6 * (fused + 3 * unrolled)
    assert eagle.fusing == pytest.approx(fused / whole) and exit_.fusing == exported.fusing == 0
    assert eagle.speed_ups[0] == speed_up_by_drafts(0.5, unrolled / whole, fusing=fused / whole)
    assert any("--loss lk" in command for command in eagle.commands), "the final head teaches, as its cost says"


def test_experts_that_a_token_does_not_ask_cost_nothing_in_tuning():
    """A `layer` exit of a mixture that is charged for all experts, 3.3 times too much for Mixtral."""
    exit_, exported = ways(mixtral(), "MODEL", 3)[-3:-1]
    router = 8 * H
    active, held = (ATTENTION + router + num_experts * MLP + NORMS for num_experts in (2, 8))
    whole = 32 * active + OUTPUT
    assert exit_.operations == exported.operations == 2 * whole + 6 * (active + H + OUTPUT)
    assert exit_.trained == exit_.added == held + H + OUTPUT, "all experts are kept, and may be tuned"
    assert exported.added == 5 * held + H + 2 * OUTPUT
    assert exit_.step == pytest.approx((5 * active + OUTPUT) / whole)


def test_the_check_of_drafts_reads_the_experts_of_all_of_them():
    """Speed-ups of a mixture as if a pass of five tokens read the experts of one."""
    sizes, dense = read_sizes(mixtral()), read_sizes(model("llama-3.1-8b"))
    assert dense.checks == (1.0,) * 8
    assert sizes.experts == 32 * 2 * MLP
    for num_tokens in (2, 5):
        drawn = torch.rand(20_000, num_tokens, 8, generator=torch.Generator().manual_seed(0)).topk(2).indices
        num_read = torch.zeros(20_000, 8).scatter_(1, drawn.flatten(1), 1.0).sum(1).mean().item()
        expected = (sizes.whole + 32 * (num_read - 2) * MLP) / sizes.whole
        assert sizes.checks[num_tokens - 2] == pytest.approx(expected, rel=0.01)
    assert speed_up_by_drafts(0.7, 0.1, (1.5, 1.2)) == pytest.approx((1 + 0.7 + 0.49) / (1.2 + 2 * 0.1))
    exit_ = ways(mixtral(), "MODEL", 3)[-3]
    assert exit_.speed_ups[1] == speed_up_by_drafts(0.7, exit_.step, sizes.checks) < speed_up_by_drafts(0.7, exit_.step)


@pytest.mark.parametrize("num_layers", range(1, 10))
def test_models_of_few_layers_are_advised(tmp_path, capsys, num_layers):
    """No table for a model of 6 layers, among which the default layers of an EAGLE-3 head, 2, 3 and 3, repeat."""
    tree = json.loads((EXAMPLES / "llama-3.1-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, "num_hidden_layers": num_layers}))
    assert cli.main(["advise", "--model", str(tmp_path)]) == 0
    assert ("EAGLE-3 head," in capsys.readouterr().out) == (num_layers >= 7)


def parsed(command: str) -> argparse.Namespace | None:
    """What the program makes of a command of its own, under torchrun or not; None for another program."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
        assert words[0] == "ee_tuning"
    return cli.parse(words[1:]) if words[0] in ("ee-tuning", "ee_tuning") else None


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-2-70b", "qwen2.5-7b", "tiny-python-llama"])
def test_commands_that_are_told_can_be_typed(name):
    """Advice with a flag that a command does not know."""
    for way in ways(model(name), "MODEL", 3):
        assert all(speed_up > 0 for speed_up in way.speed_ups) and way.step > 0 and way.operations > 0
        for command in way.commands:
            assert parsed(command) or command.startswith("vllm serve ")


def test_drafters_keep_keys_and_values_of_their_own():
    """Memory that counts weights alone: with many long requests a drafter's keys and values weigh more. Grouped queries
    that are counted as keys, and a mixture's EAGLE-3 head that is not.
    """
    group = 2 * 8 * 128  # keys and values of 8 groups, each 128 wide
    for shape in (model("llama-3.1-8b"), mixtral()):
        *thresholds, exit_, exported, eagle = ways(shape, "MODEL", 3)
        assert [way.cached for way in thresholds] == [0] * 3
        assert (exit_.cached, exported.cached, eagle.cached) == (group, 5 * group, group)


def test_the_text_and_the_object_tell_the_same(capsys):
    """A table without the formula that it comes from."""
    words = ["advise", "--model", str(EXAMPLES / "llama-3.1-8b"), "--gpu", "a100"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert all(formula in text for formula in FORMULA) and "assumed" in text
    assert cli.main([*words, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [way["name"] in text for way in tree["ways"]] == [True] * 6
    draft, eagle = tree["ways"][-2:]
    assert draft["cached_bytes_per_token"] == 20_480 and eagle["cached_bytes_per_token"] == 4096
    assert tree["cached_bytes_per_token"] == 131_072 and "131,072 bytes per token" in text and " 20,480 " in text
    assert draft["added_bytes"] > 4e9 and eagle["step"] < draft["step"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--tokens", "1" + "0" * 400], "--tokens must be a number below 2^63"),
        (["--efficiency", "2"], "--efficiency"),
        (["--gpu", "abacus"], "--gpu"),
        (["--gpu-memory", "-1"], "memory"),
        (["--set", "tuning.micro_batch_size=3"], "tuning.global_batch_size must be a multiple of micro_batch_size"),
        (["--set", "tuning.global_batch_size=0"], "tuning.global_batch_size must be at least 1"),
        (["--set", "tuning.seq_length=-4"], "tuning.seq_length must lie in 1..131072"),
        (["--set", "tuning.ttt_steps=-5"], "tuning.ttt_steps must be at least 1, got -5"),
        (["--set", "tuning.train_iters=1" + "0" * 400], "tuning.train_iters must be a whole number below 2^63"),
    ],
    ids=lambda value: value[0] + value[1][:20] if isinstance(value, list) else "",
)
def test_figures_that_make_no_sense_are_refused(capsys, flags, named):
    """Hours by division by zero, negative ones, a traceback for a number that no float can hold, and a command for
    batches that `tune` refuses.
    """
    assert cli.main(["advise", "--model", str(EXAMPLES / "llama-3.1-8b"), *flags]) == 2
    assert named in capsys.readouterr().err


def test_a_model_of_a_billion_layers_is_refused_at_once(tmp_path, capsys):
    """A config.json with a slip, or a hostile one, that keeps a core busy for hours."""
    tree = json.loads((EXAMPLES / "llama-3.1-8b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, "num_hidden_layers": 10**9}))
    assert cli.main(["advise", "--model", str(tmp_path)]) == 2
    assert "num_hidden_layers must be at most 100,000, got 1000000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--tokens", "5000001"],
        ["--set", "tuning.global_batch_size=8"],
        ["--set", "tuning.seq_length=512", "--set", "tuning.ttt_steps=5"],
    ],
    ids=" ".join,
)
def test_commands_train_on_the_tokens_of_the_table(capsys, flags):
    """GPU-hours for 100 million tokens beside a run of 1,000 steps, 33 million; other batches than those counted."""
    assert cli.main(["advise", "--model", str(EXAMPLES / "llama-3.1-8b"), "--json", *flags]) == 0
    tree = json.loads(capsys.readouterr().out)
    asked = int(flags[1]) if "--tokens" in flags else 100_000_000
    for way in tree["ways"]:
        (tune,) = [args for command in way["commands"] if " tune " in command and (args := parsed(command))]
        tuning = with_seq_length(load_config(None, tune.overrides)).tuning
        step = tuning.global_batch_size * tuning.seq_length
        assert tuning.train_iters * step == tree["tokens"] and asked <= tree["tokens"] < asked + step
        assert tuning.ttt_steps == (5 if "tuning.ttt_steps=5" in flags else 3)
        assert way["gpu_hours"] == pytest.approx(gpu_hours(way["operations"], tree["tokens"], 989, 0.5))


def test_every_file_that_a_command_reads_is_made_by_one_before_it():
    """Answers of the model that no command makes."""
    for name in ("llama-3.1-8b", "tiny-python-llama"):
        for way in ways(model(name), str(EXAMPLES / name), 3):
            made = {"TEXTS", "HELD_OUT", "PROMPTS", "MODEL_FOLDER", str(EXAMPLES / name)}
            for args in filter(None, map(parsed, way.commands)):
                named = {key: value for key, value in args.overrides.items() if key.endswith(("path", "paths"))}
                named["calibration"] = args.overrides.get("generation.calibration")
                for value in named.values():
                    assert set([value] if isinstance(value, str) else value or []) <= made, (value, way.commands)
                folder = args.overrides.get("tuning.run_folder")
                made |= {f"{folder}/exit_heads"} if folder else {str(getattr(args, "output", None))}


def test_a_model_without_a_chat_template_is_asked_given_texts(tmp_path):
    """`regenerate --own-prompts`, which such a model is refused. A folder of config.json alone tells nothing."""
    assert not writes_prompts(str(EXAMPLES / "tiny-python-llama")) and writes_prompts(str(EXAMPLES / "llama-3.1-8b"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert writes_prompts(str(tmp_path)) and writes_prompts("org/name") and writes_prompts("model.gguf")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not writes_prompts(str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    assert writes_prompts(str(tmp_path))
    regenerate = [way.commands[0] for way in ways(model("tiny-python-llama"), str(EXAMPLES / "tiny-python-llama"), 3)]
    assert "regenerate" in regenerate[-1] and "--own-prompts" not in regenerate[-1]


@pytest.mark.parametrize(
    ("family", "expected", "last"),
    [
        ("llama", "vLLM, SGLang, llama.cpp, here", "vllm serve eagle3"),
        ("qwen2", "vLLM, SGLang, here", "vllm serve eagle3"),
        ("qwen3", "vLLM, here", "vllm serve eagle3"),
        ("mixtral", "here", "ee-tuning generate"),
    ],
)
def test_engines_are_those_that_take_what_is_exported(family, expected, last):
    """An EAGLE-3 head of Mixtral's for engines whose Mixtral hands out no states, and llama.cpp left out."""
    shape = mixtral() if family == "mixtral" else model("llama-3.1-8b")
    draft, eagle = ways(dataclasses.replace(shape, family=family, has_qk_norm=family == "qwen3"), "MODEL", 3)[-2:]
    assert draft.runs_in == "vLLM, SGLang, TensorRT-LLM, llama.cpp, transformers"
    assert eagle.runs_in == expected and eagle.commands[-1].startswith(last)


def test_a_model_that_one_gpu_can_not_hold_is_told_the_fewest_that_do(tmp_path):
    """A tuning run in one process for a model that is larger than the GPU, and more GPUs than `plan` finds enough."""
    tree = json.loads((EXAMPLES / "llama-3.1-8b" / "config.json").read_text())
    sizes = {"num_hidden_layers": 4, "vocab_size": 8000, "max_position_embeddings": 64, "eos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps({**tree, **sizes, "bos_token_id": 0, "rope_scaling": None}))
    shape, small = read_model_config(tmp_path), dataclasses.replace(GPUS["l4"], memory=3.5)
    assert 2 * parameters_by_part(shape)["all"] > 1.8e9, "of 3.5 GB 2 are kept"
    tied, _, own, draft = ways(shape, str(tmp_path), 3, gpu=small)
    for way in (tied, own):
        assert all(parsed(command) or command.startswith("vllm serve ") for command in way.commands)
        (command,) = [command for command in way.commands if " tune " in command]
        job, counts = load_config(None, parsed(command).overrides), []
        for count in range(1, way.gpus + 1):
            tensor = max(size for size in (1, 2, 4, 8) if count % size == 0)
            split = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": count // tensor}
            cluster = Cluster(gpu=small, nodes=1, gpus_per_node=count, efficiency=0.5)
            counts += [count] * (count // tensor <= 4 and make_plan(replace(job, parallel=split), cluster).fits)
        assert counts == [way.gpus], "fewer do not hold it"
        parallel = job.parallel
        assert parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size == way.gpus > 1
        assert command.startswith(f"torchrun --nproc-per-node {way.gpus} -m ee_tuning tune ")
        for other in way.commands:
            if any(f" {name} " in other for name in ("generate", "calibrate", "regenerate")):
                assert other.startswith("torchrun "), "one process holds no such model"
    assert draft.commands[:2] == own.commands[:2]
    assert not any("--check" in other for other in draft.commands), "which holds the model in one process, in float32"


def test_engines_are_told_the_gpus_that_hold_the_model():
    """`vllm serve` of 137 GB on one GPU of 80 GB, and a drafter that takes the room of the model."""
    config = load_config(None, {"model.path": "MODEL"})
    for name, added, size in (("h100", 0, 2), ("h100", 10 * 10**9, 4), ("l4", 0, 8)):
        assert FewestGpus(config, model("llama-2-70b"), GPUS[name]).to_serve(added) == size
    assert FewestGpus(config, model("llama-3.1-8b"), GPUS["h100"]).to_serve(0) == 1


def test_commands_open_the_model_as_advise_did():
    """A Megatron checkpoint whose shape only the user's flags tell, without them in the commands."""
    section = ModelSection(path="a model", config="shape.json", trust_pickle=True)
    tuning = TuningSection(seq_length=2048)
    commands = commands_of(section, tuning, run_of(tuning, 1), loads_in_engines=False)
    given = {"model.path": "a model", "model.config": "shape.json", "model.trust_pickle": True}
    for way in ways_by_commands(model("llama-3.1-8b"), commands, 3):
        for args in filter(None, map(parsed, way.commands)):
            found = {key: value for key, value in args.overrides.items() if key.startswith("model.")}
            assert found in (given, {"model.path": "MODEL_FOLDER"})


def test_many_gpus_are_whole_machines():
    """16 processes of one machine of 8 GPUs."""
    split = Split(8, 2)
    assert split.program.startswith("torchrun --nnodes 2 ") and "--nproc-per-node 8 -m ee_tuning" in split.program
    assert split.flags == " --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2"


def test_a_model_that_one_gpu_holds_is_told_one_process():
    """A dry run, of seconds, for a model that is small beside its GPU; GPUs that nothing needs."""
    for name in ("llama-3.1-8b", "tiny-python-llama"):
        for way in ways(model(name), str(EXAMPLES / name), 3, gpu=GPUS["h100"]):
            assert way.gpus == 1 and not any("torchrun" in command for command in way.commands)
            assert not any("parallel-size" in command for command in way.commands)


def test_micro_batches_of_one_sequence_come_before_more_gpus(monkeypatch):
    """More GPUs for a job that fits with a smaller micro-batch, and a micro-batch of the user's that is changed."""
    config = replace(
        load_config(None, {"model.path": str(EXAMPLES / "tiny-python-llama")}), tuning={"seq_length": 1024}
    )
    shape, job = model("tiny-python-llama"), {"exits.exit_layers": "6", "exits.architecture": "norm"}
    asked = []

    def planned(own: Config, cluster: Cluster) -> TuningPlan:
        size = own.tuning.micro_batch_size
        asked.append((cluster.world_size, size))
        return SimpleNamespace(
            cluster=cluster,
            fit_bytes=0,
            stages=[
                SimpleNamespace(
                    memory={"weights": 0, "optimizer": 0, "heads": 0, "gradients": 0},
                    total_bytes=40e9 * size / cluster.world_size,
                )
            ],
        )

    monkeypatch.setattr(plan, "make_plan", planned)
    monkeypatch.setattr(fewest_gpus, "_USUAL_TOKENS", 0)
    assert FewestGpus(config, shape, GPUS["h100"]).to_tune(job, 6, 1) == Split(1, 1, 1)
    assert asked == [(1, 4), (1, 1)]
    own = replace(config, tuning={"micro_batch_size": 8})
    assert FewestGpus(own, shape, GPUS["h100"]).to_tune(job, 6, 1).num_gpus == 5
    assert Split(1, 1, 1).flags == " --micro-batch-size 1" and Split(8, 2).num_gpus == 16


def test_a_model_that_no_number_of_gpus_holds_is_told_so(capsys):
    """A command that can not run, printed like one that can, and a table of no GPUs at all."""
    words = ["advise", "--model", str(EXAMPLES / "tiny-python-llama"), "--gpu-memory", "2.000001"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "# no number of these GPUs was found that holds the next command" in text
    assert cli.main([*words, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [way["gpus"] for way in tree["ways"]] == [0] * 5
