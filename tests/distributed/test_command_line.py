"""The README's commands on the shipped model: convert, tune at TP 2 × PP 2 under torchrun, decode on four ranks."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

from world import World

from ee_tuning import cli
from ee_tuning.generation import command

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-python-llama"
TWO_BY_TWO = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


def generated(arguments: list[str]) -> str:
    """What `generate` prints on this rank, where the first one alone has a standard input that can be read."""
    typed = io.StringIO("import ") if os.environ.get("RANK", "0") == "0" else None
    with (
        mock.patch.object(sys, "stdin", typed),
        mock.patch.object(command, "destroy_parallel"),  # the world goes on
        redirect_stdout(io.StringIO()) as printed,
    ):
        assert cli.main(["generate", *arguments]) == 0
    return printed.getvalue()


def test_convert_tune_generate(world: World, tmp_path: Path) -> None:
    """Commands that work from Python but not from a shell; a tuned artifact that decodes otherwise on four ranks than
    in one process.
    """
    converted, run = tmp_path / "converted", tmp_path / "run"
    convert = f"convert --model {MODEL} --exit-layers 3,6,9 --output {converted}"
    assert cli.main(convert.split()) == 0
    tune = (
        f"-m torch.distributed.run --standalone --nproc-per-node 4 -m ee_tuning tune --model {MODEL} --exits {converted} "
        f"--data {ROOT / 'ee_tuning' / 'config'} --output {run} --train-iters 4 --seq-length 128 --micro-batch-size 2 "
        "--global-batch-size 4 --lr 1e-3 --set tuning.eval_iters=2"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *tune.split(), *TWO_BY_TWO],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (r["loss"] for r in (records[0], records[-1]))
    assert set(first) == {"3", "6", "9"} and all(last[layer] < first[layer] for layer in first), (first, last)

    flags = (
        f"--model {MODEL} --exits {run / 'exit_heads'} --threshold 0.5 --max-new-tokens 16 --ignore-eos --dtype float64"
    )
    generate = [*flags.split(), "--json", "--prompt", "def main(", "--prompt", "-"]
    one = [json.loads(line) for line in generated(generate).splitlines()]
    printed, *others = world.run(generated, [*generate, *TWO_BY_TWO])
    assert others == [""] * 3 and len(one) == 2
    for a, b in zip(one, map(json.loads, printed.splitlines()), strict=True):
        assert (a["token_ids"], a["exit_layers"]) == (b["token_ids"], b["exit_layers"])
        assert len(a["token_ids"]) == len(a["exit_layers"]) == len(a["confidences"]) == 16
        assert set(a["exit_layers"]) <= {3, 6, 9, 12} and a["tokens_per_second"] > 0 and isinstance(a["text"], str)
