"""On a CUDA device: the same logits, tokens and losses as on the CPU. Skipped without one.

Each side runs in a process of its own, since a process settles on its device once.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_llama

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "tiny-python-llama"
HAS_GPU = (
    shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]

DECODE = """
import json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.parallel.topology import init_parallel
from decoding import decode
from exits import write_exits

model, folder, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
exits = write_exits(model, folder / ("gpu" if torch.cuda.is_available() else "cpu"))
config = load_config(None, {"model.path": str(model), "exits.path": str(exits), "model.dtype": dtype})
loaded = load_for_generation(config, init_parallel(ParallelSection()))
stage = loaded.model
hidden, _ = stage.run_layers(stage.embed(torch.arange(40).reshape(2, 20).to(stage.topology.device)))
logits = F.linear(stage.final_hidden(hidden), stage.backbone.output_layer.weight)
answers = []
for prompts in ([[5, 17, 80]], [[5, 17, 80], [41, 2, 3, 4, 9]]):  # a row alone takes another kernel
    said = decode(loaded, prompts, 16, engine={"max_pending": 4}, threshold=0.5)
    answers.append([[s.tokens for s in said], [s.exit_layers for s in said]])
print(json.dumps({"device": stage.topology.device.type, "logits": logits.double().cpu().flatten().tolist(), "answers": answers}))
"""

TUNE = """
import json, sys
from pathlib import Path
from ee_tuning.config import load_config
from ee_tuning.tuning.command import tune

run = Path(sys.argv[2]) / "run"
tune(load_config(None, {
    "model.path": sys.argv[1], "model.dtype": sys.argv[3], "exits.exit_layers": [3, 6], "data.paths": [sys.argv[4]],
    "tuning.run_folder": str(run), "tuning.train_iters": 3, "tuning.seq_length": 64, "tuning.micro_batch_size": 2,
    "tuning.global_batch_size": 4, "tuning.eval_iters": 2, "tuning.lr": 1e-3, "tuning.save_interval": 1}))
print((run / "metrics.jsonl").read_text().replace("\\n", ","))
"""


def run(program: str, *arguments: object, on_gpu: bool) -> str:
    """The last line of what `program` prints."""
    seen = os.environ["EE_TUNING_TEST_GPUS"]
    paths = [
        str(ROOT / "tests"),
        str(ROOT),
        os.environ.get("PYTHONPATH", ""),
    ]  # megatron-core may lie in a folder that it names
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if on_gpu and seen == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    elif on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = seen
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def decode(model: Path, folder: Path, dtype: str, *, on_gpu: bool) -> dict[str, Any]:
    folder.mkdir()
    found = json.loads(run(DECODE, model, folder, dtype, on_gpu=on_gpu))
    assert found["device"] == ("cuda" if on_gpu else "cpu")
    return found


def model_of(shape: str, folder: Path) -> Path:
    if shape == "awkward":
        random_llama(folder / "model", confident=True)
    return SHIPPED if shape == "shipped" else folder / "model"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 2e-2)])
@pytest.mark.parametrize("shape", ["shipped", "awkward"])
def test_gpu_decodes_as_the_cpu_does(tmp_path, shape, dtype, tolerance):
    """A tensor left on the CPU, a kernel that masks otherwise or returns other strides, an index on the wrong
    device.
    """
    model = model_of(shape, tmp_path)
    gpu, cpu = (
        decode(model, tmp_path / name, dtype, on_gpu=on_gpu) for name, on_gpu in (("gpu", True), ("cpu", False))
    )
    torch.testing.assert_close(torch.tensor(gpu["logits"]), torch.tensor(cpu["logits"]), rtol=0, atol=tolerance)
    if dtype == "float64":
        assert gpu["answers"] == cpu["answers"]


@pytest.mark.parametrize("shape", ["shipped", "awkward"])
def test_gpu_decodes_in_bfloat16(tmp_path, shape):
    """A kernel of bfloat16 that sums in bfloat16, scales or masks wrongly, and still runs to its end.

    Rounding makes texts part after some tokens, so the measure is float64: the GPU may be off by twice as much as the
    CPU is in bfloat16, and most completions must begin with the token that float64 has.
    """
    model = model_of(shape, tmp_path)
    exact = decode(model, tmp_path / "exact", "float64", on_gpu=False)
    gpu, cpu = (
        decode(model, tmp_path / name, "bfloat16", on_gpu=on_gpu) for name, on_gpu in (("gpu", True), ("cpu", False))
    )
    expected = torch.tensor(exact["logits"])
    gpu_error, cpu_error = (torch.dist(torch.tensor(found["logits"]), expected) for found in (gpu, cpu))
    assert gpu_error <= 2 * cpu_error, (gpu_error, cpu_error)
    beginnings, wanted = ([row[0] for tokens, _ in found["answers"] for row in tokens] for found in (gpu, exact))
    same = [token == other for token, other in zip(beginnings, wanted, strict=True)]
    assert sum(same) >= 2 and len(same) == 3, (beginnings, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_gpu_tunes_as_the_cpu_does(tmp_path, dtype, tolerance):
    """A loss or a step that differs by more than the precision."""
    losses = []
    for name, on_gpu in (("gpu", True), ("cpu", False)):
        (tmp_path / name).mkdir()
        records = json.loads(
            f"[{run(TUNE, SHIPPED, tmp_path / name, dtype, ROOT / 'ee_tuning', on_gpu=on_gpu).rstrip(',')}]"
        )
        losses.append([list(record["loss"].values()) for record in records])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=tolerance, atol=0)
