"""Memory and time of a step whose long sequences go through the frozen layers in chunks (tuning.forward_chunk_length),
compared with whole sequences.

    python benchmarks/forward_chunks.py

A random model of the shipped model's size with room for the sequence; `mlp` exits after a quarter, a half, three
quarters and all of the layers. A step of one micro-batch, each way in processes of its own, which run one after the
other, as one process and as tensor 2 × pipeline 2. Gradients are compared rank by rank, by Adam's first moment after
the step. Memory is what the fullest process holds at its worst moment beyond the imported libraries and the weights.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_tuning.parallel.ports import free_port

LAYERS = (3, 6, 9, 12)


@dataclass(frozen=True)
class Figures:
    """One rank's part of a step."""

    seconds: float
    peak: int
    """Peak memory in bytes."""
    losses: dict[str, float]
    """Losses by exit layer, on the last stage, which has the records; empty elsewhere."""
    gradients: dict[str, Any]
    """Adam's first moment, by exit and parameter."""


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[0, 1024], help="0: whole sequences; the first is the baseline"
    )
    parser.add_argument("--layouts", nargs="+", default=["1x1", "2x2"], help="tensor x pipeline")
    parser.add_argument("--architecture", default="mlp")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    options = parser.parse_args()
    print(
        "| tensor × pipeline | chunk | s/step | peak memory of a process | loss apart | gradient apart, of its largest |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        _in_processes(_write_model, [(Path(folder), options)])
        for layout in options.layouts:
            tp, pp = map(int, layout.split("x"))
            baseline: list[Figures] = []
            for chunk in options.chunks:
                port = free_port()
                ranks = [(Path(folder), options, tp, pp, chunk, rank, port) for rank in range(tp * pp)]
                taken = _in_processes(step, ranks)
                baseline = baseline or taken
                print(_row(tp, pp, chunk, taken, baseline), flush=True)


def step(folder: Path, options: argparse.Namespace, tp: int, pp: int, chunk: int, rank: int, port: int) -> Figures:
    """Takes a rank's optimizer step by the tuner."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": tp * pp, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in world.items()})
    import numpy as np
    import torch

    torch.set_num_threads(options.threads)
    from ee_tuning.artifact.load import load_for_tuning
    from ee_tuning.config import load_config
    from ee_tuning.data.tokens import PackedSamples, Splits
    from ee_tuning.parallel.topology import init_parallel
    from ee_tuning.tuning.tuner import Tuner

    run = folder / f"run {tp} {pp} {chunk}"
    keys = {
        "model.path": str(folder / "model"),
        "model.dtype": options.dtype,
        "exits.exit_layers": list(LAYERS),
        "exits.architecture": options.architecture,
        "parallel.tensor_model_parallel_size": tp,
        "parallel.pipeline_model_parallel_size": pp,
        "tuning.seq_length": options.seq_length,
        "tuning.forward_chunk_length": chunk,
        "tuning.micro_batch_size": 1,
        "tuning.global_batch_size": 1,
        "tuning.train_iters": 1,
        "tuning.eval_iters": 0,
        "tuning.async_save": False,
        "tuning.run_folder": str(run),
    }
    config = load_config(None, keys)
    topology = init_parallel(config.parallel)
    run.mkdir(exist_ok=True)
    loaded = load_for_tuning(config, topology)
    stream = np.random.default_rng(0).integers(0, loaded.model.config.vocab_size, 2 * options.seq_length + 1)
    samples = PackedSamples(stream.astype(np.int32), options.seq_length)
    tuner = Tuner(loaded, Splits(train=samples, valid=None), config, topology)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, began = _status("VmRSS"), time.perf_counter()
    tuner.run()
    seconds, peak = time.perf_counter() - began, _status("VmHWM") - before
    return Figures(seconds, peak, _losses(run) if rank == 0 else {}, _moments(tuner))


def _moments(tuner: Any) -> dict[str, Any]:
    return {
        f"{each.layer} {name}": each.adam.state[parameter]["exp_avg"].to_local().numpy()
        for each in tuner.exits
        for name, parameter in each.parameters.items()
    }


def _losses(run: Path) -> dict[str, float]:
    import json

    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").strip().split("\n")
    losses: dict[str, float] = json.loads(lines[-1])["loss"]
    return losses


def _row(tp: int, pp: int, chunk: int, taken: list[Figures], baseline: list[Figures]) -> str:
    import numpy as np

    loss = max(abs(value / baseline[0].losses[layer] - 1) for layer, value in taken[0].losses.items())
    apart = max(
        float(np.abs(value - other.gradients[name]).max() / np.abs(other.gradients[name]).max())
        for each, other in zip(taken, baseline, strict=True)
        for name, value in each.gradients.items()
    )
    seconds, peak = max(each.seconds for each in taken), max(each.peak for each in taken)
    return f"| {tp} × {pp} | {chunk or 'whole'} | {seconds:.1f} | {peak / 2**20:.0f} MiB | {loss:.1e} | {apart:.1e} |"


def _write_model(folder: Path, options: argparse.Namespace) -> None:
    import torch
    import transformers

    shipped = Path(__file__).parents[1] / "examples" / "tiny-python-llama"
    config = transformers.AutoConfig.from_pretrained(
        shipped, trust_remote_code=False, max_position_embeddings=options.seq_length
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def _in_processes(function: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    with multiprocessing.get_context("spawn").Pool(len(arguments), maxtasksperchild=1) as pool:
        return pool.starmap(function, arguments, chunksize=1)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
