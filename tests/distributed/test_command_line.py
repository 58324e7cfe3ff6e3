"""The commands of the README, typed at a shell on the shipped model: convert, tune at TP 2 × PP 2 under torchrun,
decode at TP 2. Layouts of decoding are compared in worlds that exist already (`test_decoding_layouts.py`).
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

from ee_tuning import cli

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-python-llama"
COMMAND = ["-m", "ee_tuning"]
TWO_BY_TWO = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
TENSOR_TWO = ["--tensor-model-parallel-size", "2"]


def torchrun(num_processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), *COMMAND]


def run(*arguments: str, code: int = 0, typed: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        input=typed,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_convert_tune_generate(tmp_path, capsys, monkeypatch):
    """Commands that work from Python but not from a shell; a tuned artifact that decodes otherwise under torchrun than
    in one process.
    """
    converted, tuned = tmp_path / "converted", tmp_path / "run" / "exit_heads"
    run(*COMMAND, "convert", "--model", str(MODEL), "--exit-layers", "3,6,9", "--output", str(converted))
    run(
        *torchrun(4),
        "tune",
        "--model",
        str(MODEL),
        "--exits",
        str(converted),
        "--data",
        str(ROOT / "ee_tuning" / "config"),
        "--output",
        str(tmp_path / "run"),
        "--train-iters",
        "4",
        "--seq-length",
        "128",
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "4",
        "--lr",
        "1e-3",
        "--set",
        "tuning.eval_iters=2",
        *TWO_BY_TWO,
    )
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = (r["loss"] for r in (records[0], records[-1]))
    assert set(first) == {"3", "6", "9"} and all(last[layer] < first[layer] for layer in first), (first, last)

    generate = [
        "generate",
        "--model",
        str(MODEL),
        "--exits",
        str(tuned),
        "--prompt",
        "def main(",
        "--prompt",
        "-",
        "--threshold",
        "0.5",
        "--max-new-tokens",
        "16",
        "--ignore-eos",
        "--dtype",
        "float64",
        "--json",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("import "))
    capsys.readouterr()
    assert cli.main(generate) in (0, None)
    one = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    two = [json.loads(line) for line in run(*torchrun(2), *generate, *TENSOR_TWO, typed="import ").stdout.splitlines()]
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert (a["token_ids"], a["exit_layers"]) == (b["token_ids"], b["exit_layers"])
        assert len(a["token_ids"]) == len(a["exit_layers"]) == len(a["confidences"]) == 16
        assert set(a["exit_layers"]) <= {3, 6, 9, 12} and a["tokens_per_second"] > 0 and isinstance(a["text"], str)


def test_bad_input_ends_with_code_2_and_one_line():
    """A traceback for a misspelt number."""
    done = run(*COMMAND, "generate", "--model", str(MODEL), "--prompt", "x", "--threshold", "high", code=2)
    assert done.stderr.startswith("ee-tuning: error: ") and done.stderr.count("\n") == 1
