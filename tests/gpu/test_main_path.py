"""On a CUDA device: the same logits, tokens and first losses as on the CPU. Skipped without one.

Each side runs in a process of its own: a process settles on its device once.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import random_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROGRAM = """
import json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from ee_tuning.checkpoint.load import load_for_generation
from ee_tuning.config import GenerationSection, ParallelSection, load_config
from ee_tuning.generation.engine import Engine, Sampling
from ee_tuning.generation.pieces import policy_of
from ee_tuning.parallel.topology import init_parallel
from exits import write_exits

folder, dtype = sys.argv[1:]
folder = Path(folder)
exits = write_exits(folder / "model", folder / ("exits-gpu" if torch.cuda.is_available() else "exits-cpu"))
config = load_config(None, {"model.path": str(folder / "model"), "exits.path": str(exits), "model.dtype": dtype})
loaded = load_for_generation(config, init_parallel(ParallelSection()))
model = loaded.model
tokens = torch.arange(40).reshape(2, 20).to(model.topology.device)
hidden, _ = model.run_layers(model.embed(tokens))
logits = F.linear(model.final_hidden(hidden), model.backbone.output_layer.weight)
engine = Engine(model, loaded.stages, num_slots=2, max_length=64)
policy = policy_of(GenerationSection(threshold=0.5), (2, 4), 6)
sequences = [engine.add(prompt, Sampling()) for prompt in ([5, 17, 80], [41, 2, 3, 4, 9])]
left = [[step.exit_layer for step in engine.step(policy)] for _ in range(16)]
print(json.dumps({"device": model.topology.device.type, "logits": logits.double().cpu().flatten().tolist(),
                  "tokens": [s.tokens for s in sequences], "left": left}))
"""


def answer(folder: Path, dtype: str, *, on_gpu: bool) -> dict[str, object]:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), dtype], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == ("cuda" if on_gpu else "cpu")
    return found


def test_gpu_decodes_as_the_cpu_does(tmp_path):
    """A tensor left on the CPU, a kernel that masks otherwise, an index on the wrong device."""
    random_llama(tmp_path / "model", confident=True)
    gpu, cpu = (answer(tmp_path, "float64", on_gpu=on_gpu) for on_gpu in (True, False))
    torch.testing.assert_close(torch.tensor(gpu["logits"]), torch.tensor(cpu["logits"]), rtol=0, atol=1e-6)
    assert (gpu["tokens"], gpu["left"]) == (cpu["tokens"], cpu["left"])
