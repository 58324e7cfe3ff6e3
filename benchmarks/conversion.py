"""Memory and speed of conversion and export, on a synthetic model of 3B parameters, which is created and removed here.

    python benchmarks/conversion.py                       # all of it; needs about 30 GB of disk for some minutes
    python benchmarks/conversion.py --only convert --folder /data/tmp --keep

Each job runs in its own processes, alternating with `cp -r` of the files that it wrote, with warm caches and all
earlier writes flushed; the tables show medians. Time is that of the job itself, imports and process groups left out.
The job ends when its bytes are on the disk (fsync), `cp` alone when they are in the system's cache: both times are
given. Memory is the highest VmHWM of any of the processes (file-backed pages included). The claim: at most 1.5 × the
largest group of tensors (a layer, the embedding, the output matrix) + 1 GB.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ee_tuning.artifact.inspect import model_facts
from ee_tuning.checkpoint.names import backbone_tensor_shapes
from ee_tuning.config import load_config
from ee_tuning.model_config.config import read_model_config
from ee_tuning.storage.hashed_file import HashedFile
from ee_tuning.storage.safetensors_layout import SafetensorsLayout

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONSTANT, FACTOR = 10**9, 1.5
JOBS = ("convert", "export hf", "export megatron", "megatron to hf")


@dataclass(frozen=True)
class Timing:
    """One run of a job."""

    seconds: float
    peak: int
    """VmHWM, bytes."""
    file_backed: int
    """Mapped files in the resident memory, at most, in bytes."""


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the model and its copies go"
    )
    parser.add_argument("--only", choices=JOBS, nargs="+", default=list(JOBS))
    parser.add_argument("--processes", type=int, nargs="*", default=[2], help="numbers beside 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument(
        "--keep", action="store_true", help="leave model, exits and Megatron checkpoint for the next run"
    )
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        run_job(*options.job)
        return
    work = (
        options.folder / f"ee-tuning-conversion-{options.layers}-layers"
    )  # a kept model is reused for the same number of layers only
    try:
        prepare(work, options.layers)
        report(work, options)
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)


def prepare(work: Path, num_layers: int) -> None:
    """Creates the model, its exits, and a Megatron checkpoint of it, unless they exist."""
    needed = 30 * 10**9 * num_layers // SHAPE["num_hidden_layers"]
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model" / "config.json").exists():
        if (free := shutil.disk_usage(work).free) < needed:
            raise SystemExit(
                f"{work} needs {needed / 1e9:.0f} GB, and {free / 1e9:.0f} are free there; give another --folder"
            )
        write_model(work / "model", {**SHAPE, "num_hidden_layers": num_layers})
    for name, job in (("exits", "convert"), ("megatron", "export megatron")):
        if not (work / name).exists():
            measured(job, work, work / name, 1)


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Writes weights that repeat one block of random numbers: their values do not affect the costs."""
    folder.mkdir()
    torch.manual_seed(0)
    block = (torch.randn(8 << 20) * 0.02).bfloat16()
    (folder / "config.json").write_text(json.dumps(shape))
    config = read_model_config(folder)
    layout = SafetensorsLayout("model", backbone_tensor_shapes(config), torch.bfloat16)
    for file, names in layout.files.items():
        with HashedFile(folder / file) as made:
            made.write(layout.headers[file])
            for name in names:
                left = layout.tensor_bytes(name) // 2
                while left:
                    left -= made.write(block[: min(left, len(block))]) // 2
    layout.write_index(folder)


def report(work: Path, options: argparse.Namespace) -> None:
    """Alternates the jobs with `cp`, and prints the table."""
    facts = model_facts(work / "model")
    limit = FACTOR * facts["largest_group_bytes"] + CONSTANT
    print(
        f"{facts['parameters']['all'] / 1e9:.2f}B parameters, {facts['bytes'] / 1e9:.2f} GB; largest group "
        f"{facts['largest_group_bytes'] / 1e6:.0f} MB, so at most {limit / 1e6:.0f} MB may be resident\n"
    )
    print(
        "| job | processes | GB written | seconds | cp | cp, then fsync | cp ÷ job | cp and fsync ÷ job | goal | peak MB | of it files | "
        "goal | met |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for job in options.only:
        alone = None
        for processes in (1, *options.processes):
            runs, copies, synced, size = compare(job, work, processes, options.rounds)
            seconds, copy, sync = (
                statistics.median(values) for values in ([run.seconds for run in runs], copies, synced)
            )
            alone = alone or seconds
            peak = max(run.peak for run in runs)
            is_met = peak <= limit and (copy / seconds >= 0.6 if processes == 1 else seconds < alone)
            goal = "≥ 0.6" if processes == 1 else f"< {alone:.1f} s"
            print(
                f"| {job} | {processes} | {size / 1e9:.2f} | {seconds:.1f} | {copy:.1f} | {sync:.1f} | {copy / seconds:.2f} | "
                f"{sync / seconds:.2f} | {goal} | {peak / 1e6:.0f} | {max(run.file_backed for run in runs) / 1e6:.0f} | "
                f"≤ {limit / 1e6:.0f} | {'yes' if is_met else 'no'} |",
                flush=True,
            )


def compare(job: str, work: Path, processes: int, rounds: int) -> tuple[list[Timing], list[float], list[float], int]:
    """Returns runs of the job; seconds of `cp`, and of `cp` with fsync, for its output; and the size of the output."""
    runs, copies, synced, size = [], [], [], 0
    output, copy = work / "output", work / "copy"
    for _ in range(rounds):
        shutil.rmtree(output, ignore_errors=True)
        runs.append(measured(job, work, output, processes))
        size = sum(path.stat().st_size for path in output.iterdir())
        os.sync()
        read_once([output])  # as for the job's sources: a job may bypass the system's cache when it writes
        since = time.perf_counter()
        subprocess.run(["cp", "-r", str(output), str(copy)], check=True)
        copies.append(time.perf_counter() - since)
        subprocess.run(["sync", *map(str, copy.iterdir())], check=True)
        synced.append(time.perf_counter() - since)
        shutil.rmtree(copy)
    shutil.rmtree(output)
    return runs, copies, synced, size


def measured(job: str, work: Path, output: Path, processes: int) -> Timing:
    """Runs the job once, in new processes, with its inputs in the system's cache. Returns the slowest process's time
    and the largest one's memory.
    """
    os.sync()
    read_once([work / "megatron"] if job == "megatron to hf" else [work / "model", work / "exits"])
    with tempfile.TemporaryDirectory() as results:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        )
        subprocess.run(
            [sys.executable, *launcher, __file__, "--folder", str(work), "--job", job, str(output), results],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        told = [json.loads(path.read_text()) for path in Path(results).iterdir()]
    assert len(told) == processes
    return Timing(*(max(each[key] for each in told) for key in ("seconds", "peak", "file_backed")))


def read_once(folders: list[Path]) -> None:
    """Reads the files once, so that the system keeps them in its cache."""
    for path in [each for folder in folders for each in folder.glob("*")]:
        with path.open("rb") as file:
            while file.read(16 << 20):
                pass


def run_job(job: str, output: str, results: str) -> None:
    """Runs the job in each process, and writes its costs."""
    import threading

    from ee_tuning.artifact.convert import write_initial_exits
    from ee_tuning.export.export_huggingface import export_huggingface
    from ee_tuning.export.megatron_writer import write_megatron
    from ee_tuning.parallel.topology import destroy_parallel, init_parallel

    work = Path(output).parent
    model = work / ("megatron" if job == "megatron to hf" else "model")
    keys, depth = (
        {"model.path": str(model)},
        json.loads((work / "model" / "config.json").read_text())["num_hidden_layers"],
    )
    exit_layers = ",".join(str(depth * quarter // 4) for quarter in (1, 2, 3, 4))
    keys |= (
        {"exits.exit_layers": exit_layers}
        if job == "convert"
        else {"exits.path": str(work / "exits")}
        if "export" in job
        else {}
    )
    config = load_config(None, keys)
    topology = init_parallel(config.parallel)
    ended, file_backed = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(0.02):
            file_backed[0] = max(file_backed[0], memory("RssFile"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    topology.barrier()
    since = time.perf_counter()
    {"convert": write_initial_exits, "export megatron": write_megatron}.get(job, export_huggingface)(
        config, Path(output), topology
    )
    seconds = time.perf_counter() - since
    ended.set()
    watcher.join()
    Path(results, str(topology.rank)).write_text(
        json.dumps({"seconds": seconds, "peak": memory("VmHWM"), "file_backed": file_backed[0]})
    )
    destroy_parallel()


def memory(key: str) -> int:
    """Returns a figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
