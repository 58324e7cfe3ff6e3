"""Commands that tune."""

import argparse
import sys
from pathlib import Path
from shlex import quote

from ee_tuning.commands.command import Command, add_job, add_profile, job_of, with_measured_layers
from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError
from ee_tuning.notices import say

_UNUSED_BY_PLAN = (
    "data.paths",
    "data.tokenizer",
    "model.trust_remote_code",
    "data.chat_template",
    "tuning.run_folder",
    "tuning.lr",
    "tuning.seed",
    "tuning.resume",
    "tuning.allow_config_change",
)
"""Keys of tune's flags that do not affect the costs of a job."""
_FIGURES = {
    "memory": "gpu_memory",
    "tflops": "tflops",
    "bandwidth": "bandwidth",
    "link": "link",
    "network": "network",
}
"""Figure of a GPU -> name of its flag."""


def _job_of(args: argparse.Namespace) -> Config:
    """Loads the job of `tune` or `plan`, whose exits are an artifact or new ones."""
    from ee_tuning.artifact.begun_exits import with_begun_exits

    return with_begun_exits(job_of(args), args.overrides)


def tune(args: argparse.Namespace) -> int:
    """Tunes exits into a run folder."""
    config = _job_of(args)
    if args.dry_run:
        from ee_tuning.planning.dry_run import dry_run

        dry_run(config, args.world_size)
        return 0
    if args.world_size is not None:
        raise InputError(
            "--world-size is a size to imagine, for --dry-run; a true run takes the launcher's: torchrun --nproc-per-node N"
        )
    from ee_tuning.tuning.command import tune

    return tune(with_measured_layers(config), args.profile)


def preprocess(args: argparse.Namespace) -> None:
    """Tokenizes texts to .bin and .idx."""
    from ee_tuning.data.preprocess import preprocess

    config = load_config(args.config, args.overrides)
    written = preprocess(config.data, args.output, args.overwrite, trusts_code=config.model.trust_remote_code)
    print(
        f"wrote {args.output}.bin and .idx: {written.num_documents:,} documents, {written.num_tokens:,} tokens\n"
        f"next: ee-tuning tune --data {quote(str(args.output))} …"
    )


def _add_preprocess(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "preprocess")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx are written"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a PREFIX that is already there")


def plan(args: argparse.Namespace) -> int:
    """Plans a job on a cluster. Returns 1 where it does not fit."""
    config = _job_of(args)
    _warn_unused(args, config)
    if args.cluster is not None:
        return _plan_layouts(args, config)
    from ee_tuning.planning.gpus import GPUS_PER_NODE, gpu
    from ee_tuning.planning.plan import EFFICIENCY, Cluster, make_plan, smallest_plan
    from ee_tuning.planning.report import print_plan

    chosen = gpu(args.gpu or "h100", **{name: getattr(args, flag) for name, flag in _FIGURES.items()})
    efficiency = EFFICIENCY if args.efficiency is None else args.efficiency
    if is_smallest := args.nodes is None and args.gpus_per_node is None:
        found = smallest_plan(config, chosen, efficiency)
    else:
        nodes = 1 if args.nodes is None else args.nodes
        per_node = GPUS_PER_NODE if args.gpus_per_node is None else args.gpus_per_node
        found = make_plan(config, Cluster(gpu=chosen, nodes=nodes, gpus_per_node=per_node, efficiency=efficiency))
    return 0 if print_plan(config, found, is_smallest=is_smallest, as_json=args.json) else 1


def _plan_layouts(args: argparse.Namespace, config: Config) -> int:
    """Chooses the layout of a cluster. Returns 1 where none fits."""
    for name in ("gpu", "nodes", "gpus_per_node", *_FIGURES.values(), "efficiency"):
        if getattr(args, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} is of the cluster, which --cluster {args.cluster} describes; leave one of them out"
            )
    from ee_tuning.planning.cluster_file import read_cluster
    from ee_tuning.planning.layouts import Layout, layouts
    from ee_tuning.planning.layouts_text import print_layouts

    def tell(layout: Layout) -> None:
        _tell(f"planned tensor {layout.tensor} × pipeline {layout.pipeline} ")

    parallel = config.parallel
    given = {
        size: getattr(parallel, f"{size}_model_parallel_size")
        for size in ("tensor", "pipeline")
        if f"parallel.{size}_model_parallel_size" in args.overrides
    }
    found = layouts(config, read_cluster(args.cluster), **given, on_layout=tell)
    _tell("")
    return 0 if print_layouts(config, found, as_json=args.json) else 1


def _tell(text: str) -> None:
    """Shows what is under way in the terminal's last line."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def _warn_unused(args: argparse.Namespace, config: Config) -> None:
    """Warns, on stderr, of keys that tuning would use and a plan does not."""
    given = [key for key in _UNUSED_BY_PLAN if key in args.overrides or (key == "data.paths" and config.data.paths)]
    if given:
        say(f"plan does not use {', '.join(given)}: it reads no data and writes nothing")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "plan")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="GPU, with the peak figures of its data sheet: h100, h200, a100, rtx4090 or l4 (default h100)",
    )
    parser.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="YAML file of the machines (gpu, nodes, gpus_per_node; memory, tflops, bandwidth, link, network, efficiency in place of "
        "documented figures): choose tensor × pipeline × data for them",
    )
    parser.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="number of machines; without this and --gpus-per-node, the fewest GPUs that fit",
    )
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs per machine (default 8 with --nodes)")
    for flag, text in (
        ("--gpu-memory", "GB of a GPU"),
        ("--tflops", "10¹² bfloat16 operations a second of a GPU, dense"),
        ("--bandwidth", "GB/s of a GPU's memory"),
        ("--link", "GB/s from a GPU to others of its node, in one direction"),
        ("--network", "GB/s from a GPU to other nodes, in one direction"),
    ):
        parser.add_argument(flag, type=float, metavar="X", help=f"{text}, instead of the documented figure")
    parser.add_argument(
        "--efficiency",
        type=float,
        metavar="X",
        help="share of its peak rate that a GPU is assumed to reach (default 0.5)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def advise(args: argparse.Namespace) -> None:
    """Prints what each way to decode a model faster would cost and could gain."""
    config = job_of(args)
    from ee_tuning.artifact.shapes import with_seq_length
    from ee_tuning.checkpoint.formats import is_huggingface, read_shape
    from ee_tuning.data.loader import count_microbatches
    from ee_tuning.data.splits import check_data_settings
    from ee_tuning.planning.advice_commands import commands_of, run_of
    from ee_tuning.planning.advice_text import print_advice
    from ee_tuning.planning.advise import ways
    from ee_tuning.planning.fewest_gpus import FewestGpus
    from ee_tuning.planning.gpus import gpu
    from ee_tuning.tuning.settings import check_settings

    check_settings(config.tuning)
    chosen = gpu(args.gpu, memory=args.gpu_memory, tflops=args.tflops, bandwidth=args.bandwidth)
    if args.tokens < 1 or not 0 < args.efficiency <= 1:
        raise InputError(
            f"--tokens must be at least 1 and --efficiency in (0, 1], got {args.tokens} and {args.efficiency:g}"
        )
    model = read_shape(config.model, needs_weights=False)
    known = with_seq_length(config, model)
    count_microbatches(known.tuning, 1)
    check_data_settings(known.data, known.tuning.seq_length, model.max_position_embeddings, needs_validation=False)
    run = run_of(known.tuning, args.tokens)
    commands = commands_of(
        config.model,
        config.tuning,
        run,
        loads_in_engines=is_huggingface(config.model.path) and not config.model.adapter,
        gpus=FewestGpus(known, model, chosen, on_plan=lambda num_gpus: _tell(f"dry run on {num_gpus} {chosen.name} ")),
    )
    found = ways(model, commands, config.tuning.ttt_steps)
    _tell("")
    print_advice(model, config.model.path, found, chosen, run=run, efficiency=args.efficiency, as_json=args.json)


def _add_advise(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "advise")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="GPU, with the peak figures of its data sheet: h100, h200, a100, rtx4090 or l4 (default %(default)s)",
    )
    parser.add_argument("--gpu-memory", type=float, metavar="X", help="GB of its memory, in place of that figure")
    parser.add_argument("--tflops", type=float, metavar="X", help="10¹² bfloat16 operations a second, in its place")
    parser.add_argument("--bandwidth", type=float, metavar="X", help="GB/s of the memory, in its place")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.5,
        metavar="X",
        help="share of its peak rate that a GPU is assumed to reach (default %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens of tuning, rounded up to whole steps (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "tune")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="do not tune, but run one rank of each kind of stage through a step on tensors without values, in one process, "
        "without a GPU. Needs only the model's config.json, and no data",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --dry-run: number of simulated processes (default tensor × pipeline)",
    )
    add_profile(parser)


COMMANDS = (
    Command(
        name="preprocess",
        summary="tokenize texts into .bin and .idx files, which Megatron-core reads, too",
        examples="""\
  ee-tuning preprocess --data corpus.jsonl --tokenizer Llama-2-7b-hf --output corpora/mine
  ee-tuning preprocess --data chats/ more.parquet --tokenizer Qwen2.5-7B-Instruct --workers 16 --output corpora/chats

Every document ends with the tokenizer's end of text. For chats, PREFIX.mask marks the assistant's words, which are the labels.
tune also reads texts directly, and caches their tokens: use preprocess for other programs or other machines.
A blend of both corpora is --data 0.3 corpora/mine 0.7 corpora/chats.""",
        add_arguments=_add_preprocess,
        run=preprocess,
    ),
    Command(
        name="tune",
        summary="train the exit heads; the model is frozen and has no backward pass, unless --trainable asks for it",
        examples="""\
  ee-tuning tune --model Llama-2-7b-hf --exits exits/llama-2-7b --data corpus.jsonl --output runs/llama-2-7b
  torchrun --nproc-per-node 8 -m ee_tuning tune job.yaml --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4
  ee-tuning tune job.yaml --dry-run --world-size 128

Without --exits, it first converts by --exit-layers, --architecture, --init and --exit-output.
The tuned artifact is OUTPUT/exit_heads. With --trainable lora, mlp, last:K, half, backbone or all the model is trained, too: see OUTPUT/adapter.
The same command continues a run that was stopped or killed, at any layout.""",
        add_arguments=_add_tune,
        run=tune,
    ),
    Command(
        name="plan",
        summary="plan a tuning job on GPUs: memory, split of layers, time and GPU-hours; needs no GPU",
        examples="""\
  ee-tuning plan examples/llama-2-70b/job.yaml --gpu h100 --nodes 1
  ee-tuning plan --model Llama-2-7b-hf --exit-layers 8,16,24 --micro-batch-size 1
  ee-tuning plan job.yaml --gpu a100 --nodes 2 --gpus-per-node 4 --json
  ee-tuning plan examples/llama-2-70b/job.yaml --cluster examples/cluster.yaml
  ee-tuning plan examples/llama-2-7b/card-24gb.yaml --gpu rtx4090 --gpus-per-node 1 --efficiency 0.4

It has the flags of tune. Without --nodes and --gpus-per-node, it finds the fewest GPUs that can hold the job.
--cluster plans every tensor × pipeline × data of the machines in a file, prints them, and chooses the fastest that fits.
Memory comes from a dry run of the job, which needs only the model's config.json; time comes from a formula, which is printed.
The exit code is 1 where the job does not fit.""",
        add_arguments=_add_plan,
        run=plan,
    ),
    Command(
        name="advise",
        summary="compare exits, draft models and EAGLE-3 for a model: memory, possible speed-up, tuning GPU-hours, commands",
        examples="""\
  ee-tuning advise --model Llama-2-7b-hf
  ee-tuning advise --model examples/llama-2-70b --gpu h200 --tokens 500000000 --json

It needs the model's config.json and no GPU. Everything is computed from the model's shape by formulas, which are printed; what share of
drafts or exits is right is left open, and `tune` and `calibrate` measure it. The commands train on as many tokens as the GPU-hours are for,
on the fewest GPUs that hold the model, which dry runs as in `plan` find.""",
        add_arguments=_add_advise,
        run=advise,
    ),
)
