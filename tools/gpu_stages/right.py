"""Stage 1: correctness."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ee_tuning.artifact.convert import write_initial_exits
from ee_tuning.config import Config, ParallelSection, load_config
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.tuning.command import tune_within
from gpu_stages.bench import ROOT, SHIPPED, Bench
from gpu_stages.checks import Check, Finding, at_least, at_most

EXIT_LAYERS = (3, 6, 9)
PROMPTS = (
    "def main():\n",
    "import os\n\nclass Reader:\n    def __init__(self",
    "for i in range(10):\n    print(",
    "return {",
)
POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "fixed": {"policy": "fixed", "exit_layer": 6},
    "threshold": {"policy": "threshold", "threshold": 0.5},
    "speculative": {"policy": "speculative"},
}
GPU_TESTS = ROOT / "tests" / "gpu"


def tests_for_gpus(bench: Bench, folder: Path = GPU_TESTS) -> Iterator[Finding]:
    """Runs tests/gpu, several at a time if pytest-xdist is installed: most of their time goes to starting processes."""
    if bench.is_inline and folder == GPU_TESTS:
        folder = bench.folder()
        (folder / "test_nothing.py").write_text("def test_nothing():\n    pass\n", encoding="utf-8")
    record, has_xdist = bench.folder() / "junit.xml", _is_there("xdist")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(folder),
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--junitxml={record}",
        *(["-n", "8"] if has_xdist and not bench.is_inline else []),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT if folder == GPU_TESTS else folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    if not record.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    cases = list(ET.parse(record).getroot().iter("testcase"))
    failed = [(case, problem) for case in cases for problem in case if problem.tag in ("failure", "error")]
    num_skipped = sum(problem.tag == "skipped" for case in cases for problem in case)
    yield at_least("tests/gpu: tests that ran", len(cases) - num_skipped, 1 if bench.is_cuda else 0, is_must=True)
    for case, problem in failed:
        yield Finding(
            what=f"{case.get('name')}", value=(problem.text or "")[-6000:], goal="passes", is_met=False, is_must=True
        )


def as_transformers(bench: Bench, dtype: str) -> Iterator[Finding]:
    """Compares full depth with transformers' own `generate`, on the same device, prompt by prompt."""
    from ee_tuning import EarlyExitLLM

    llm = EarlyExitLLM.load(SHIPPED, dtype=dtype)
    ours = [
        each.token_ids
        for each in llm.generate(list(_prompts(bench)), max_new_tokens=_num_new(bench), ignore_eos=True, policy="full")
    ]
    theirs = _of_transformers(bench, [llm.encode(prompt) for prompt in _prompts(bench)], dtype)
    # In bfloat16 logits often tie, and the text after such a token differs.
    yield at_least(
        f"tokens as transformers', {dtype}",
        _same(ours, theirs),
        0.99 if dtype == "float32" else 0.3,
        is_must=dtype == "float32",
    )


def _of_transformers(bench: Bench, prompts: list[list[int]], dtype: str) -> list[list[int]]:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        SHIPPED, dtype=getattr(torch, dtype), trust_remote_code=False
    )
    model = model.to(bench.device).eval()
    model.generation_config.eos_token_id = None
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=bench.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=_num_new(bench),
                pad_token_id=0,
            )
        said.append(out[0, len(prompt) :].tolist())
    return said


def answers(exits: str, num_new: int, prompts: tuple[str, ...]) -> dict[str, list[list[int]]]:
    """Returns, by policy, the token ids after each prompt, in float32, on the device that this process sees."""
    from ee_tuning import EarlyExitLLM

    llm = EarlyExitLLM.load(SHIPPED, exits, dtype="float32")
    return {
        name: [
            each.token_ids for each in llm.generate(list(prompts), max_new_tokens=num_new, ignore_eos=True, **policy)
        ]
        for name, policy in POLICIES.items()
    }


def as_the_cpu(bench: Bench, graphs: str) -> Iterator[Finding]:
    """Compares every policy with the CPU's tokens in float32, with CUDA graphs as EE_TUNING_GRAPHS says."""
    exits = _exits(bench)
    asked = (str(exits), _num_new(bench), _prompts(bench))
    wanted = bench.without_gpu(answers, *asked)
    before = os.environ.get("EE_TUNING_GRAPHS")
    os.environ["EE_TUNING_GRAPHS"] = graphs
    try:
        found = answers(*asked)
    finally:
        if before is None:
            del os.environ["EE_TUNING_GRAPHS"]
        else:
            os.environ["EE_TUNING_GRAPHS"] = before
    for name, tokens in wanted.result().items():
        yield at_least(f"tokens as the CPU's, graphs {graphs}, {name}", _same(found[name], tokens), 0.95, is_must=True)


def losses(folder: str, num_steps: int, seq_length: int, fit_tokens: int) -> list[dict[str, float]]:
    """Returns the losses of each exit by step: a tuning run of the shipped model in float32, on the device that this
    process sees.
    """
    config = tuning_job(folder, num_steps, seq_length, **{"tuning.fit_tokens": fit_tokens})
    tune_within(config, init_parallel(config.parallel))
    return train_losses(Path(folder))


def train_losses(run_folder: Path) -> list[dict[str, float]]:
    """Returns the losses of each exit by step, from the record of a run."""
    records = [
        json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    return [record["loss"] for record in records if record["kind"] == "train"]


def tunes_as_the_cpu(bench: Bench) -> Iterator[Finding]:
    """Compares the losses of twenty steps with the CPU's."""
    sizes = (2, 32, 1000) if bench.is_tiny else (20, 256, 0)
    asked = bench.without_gpu(losses, str(bench.folder()), *sizes)
    found = losses(str(bench.folder()), *sizes)
    wanted = asked.result()
    apart = max(abs(one[layer] / other[layer] - 1) for one, other in zip(found, wanted, strict=True) for layer in other)
    yield at_most(f"losses of {len(found)} steps, relative to the CPU's", apart, 1e-3, is_must=True)


def from_convert_to_export(bench: Bench) -> Iterator[Finding]:
    """Runs convert, export --check and verify by the command line, as a user would."""
    folder = bench.folder()
    job = ("--model", SHIPPED, "--dtype", "float32")
    bench.command("convert", *job, "--exit-layers", "6", "--output", folder / "exits")
    said = bench.command(
        "export", *job, "--exits", folder / "exits", "--format", "hf", "--check", "--output", folder / "export"
    )
    bench.command("verify", folder / "export")
    worst = max(
        float(line.partition("difference ")[2].split()[0]) for line in said.split("\n") if "difference " in line
    )
    yield at_most("export --check: largest difference of logits", worst, 1e-3, is_must=True)


def tuning_job(folder: str, num_steps: int, seq_length: int, **more: Any) -> Config:
    """Returns a tuning job for the shipped model in float32 on this project's own sources."""
    return load_config(
        None,
        {
            "model.path": str(SHIPPED),
            "model.dtype": "float32",
            "exits.exit_layers": list(EXIT_LAYERS),
            "data.paths": [str(ROOT / "ee_tuning" / "model")],
            "tuning.run_folder": folder,
            "tuning.train_iters": num_steps,
            "tuning.seq_length": seq_length,
            "tuning.micro_batch_size": 2,
            "tuning.global_batch_size": 4,
            "tuning.eval_iters": 1,
            "tuning.lr": 1e-3,
            "tuning.lr_warmup_fraction": 0.1,
            **more,
        },
    )


def _exits(bench: Bench) -> Path:
    """Returns heads copied from the shipped model, made once."""
    folder = bench.scratch / "shipped_exits"
    if not folder.exists():
        config = load_config(
            None, {"model.path": str(SHIPPED), "exits.exit_layers": list(EXIT_LAYERS), "exits.init": "copy"}
        )
        write_initial_exits(config, folder, init_parallel(ParallelSection()))
    return folder


def _prompts(bench: Bench) -> tuple[str, ...]:
    return PROMPTS[:2] if bench.is_tiny else PROMPTS


def _num_new(bench: Bench) -> int:
    return 6 if bench.is_tiny else 64


def _same(some: list[list[int]], others: list[list[int]]) -> float:
    """Returns the share of tokens before the first difference within their sequence."""
    same = 0
    for one, other in zip(some, others, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
    return same / sum(map(len, some))


def _is_there(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


CHECKS = (
    Check("transformers' tokens in float32", 15, partial(as_transformers, dtype="float32")),
    Check("transformers' tokens in bfloat16", 10, partial(as_transformers, dtype="bfloat16")),
    Check("policies, by CUDA graphs", 30, partial(as_the_cpu, graphs="1")),
    Check("policies, kernel by kernel", 10, partial(as_the_cpu, graphs="0")),
    Check("20 tuning steps", 40, tunes_as_the_cpu),
    Check("convert, export, --check", 45, from_convert_to_export),
    Check("tests/gpu", 90, tests_for_gpus),
    Check("policies, by fused graphs", 40, partial(as_the_cpu, graphs="fused")),
)
