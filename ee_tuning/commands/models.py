"""Commands on models and exits on disk."""

import argparse
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, job_of
from ee_tuning.config import load_config
from ee_tuning.errors import InputError


def convert(args: argparse.Namespace) -> None:
    """Writes an exit-heads artifact for a backbone."""
    config = job_of(args)
    from ee_tuning.evaluation.profile import with_exit_layers

    if config.exits.init == "fitted" or config.exits.output_vocab:
        from ee_tuning.tuning.command import convert_by_texts as convert
    else:
        from ee_tuning.checkpoint.convert import convert
    convert(with_exit_layers(config), args.output, overwrite=args.overwrite)


def inspect(args: argparse.Namespace) -> None:
    """Describes a model or an artifact."""
    from ee_tuning.checkpoint.inspect import inspect_path

    given = [path for path in (args.path, args.model) if path is not None]
    if len(given) != 1:
        raise InputError(f"inspect looks at one folder, got {len(given)}; give FOLDER, or --model FOLDER")
    inspect_path(given[0], as_json=args.json, config=args.config, trust_pickle=args.trust_pickle)


def profile(args: argparse.Namespace) -> None:
    """Measures how far each layer turns the hidden states."""
    config = job_of(args)
    from ee_tuning.evaluation.profile import profile

    profile(config, args)


def export(args: argparse.Namespace) -> int:
    """Writes exits, or a model with its exits, in another form. Returns 1 where a check of the export fails."""
    from ee_tuning.evaluation.export import export

    return export(load_config(args.config, args.overrides), args)


def verify(args: argparse.Namespace) -> int:
    """Verifies files. Returns 1 where a model holds NaN or infinity."""
    from ee_tuning.checkpoint.verify import verify_folder

    return 0 if verify_folder(args.path, trust_pickle=args.trust_pickle) else 1


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "convert")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where the exit-heads artifact goes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an exit-heads artifact that is already there")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="FOLDER",
        help="a model's folder (Hugging Face, Megatron) or one with no more than its config.json, a GGUF file, or a name "
        "on the Hugging Face hub; or an exit-heads artifact",
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the same, said as other commands say it")
    parser.add_argument(
        "--config", metavar="FILE", help="shape of a Megatron checkpoint whose saved arguments lack something"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle whatever a Megatron checkpoint asks for; it may run anything",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "profile")
    parser.add_argument(
        "--num-exits", type=int, default=3, metavar="N", help="how many exits to place (default %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("profile.png"), metavar="FILE", help="the picture (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "export")
    parser.add_argument(
        "--format",
        required=True,
        choices=("artifact", "hf", "megatron"),
        help="artifact: exits alone. hf: the model with its exits, as a folder for transformers. "
        "megatron: as a distributed checkpoint of Megatron-core",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the export goes")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an export of the same format that is already there"
    )
    for flag, text in (
        ("--only", "artifact: of --exits, just those after these layers"),
        ("--drop", "artifact: of --exits, all but those after these layers"),
        ("--add", "artifact: new exits after these layers, initialized from --model as convert does"),
    ):
        parser.add_argument(flag, nargs="+", default=[], metavar="N", help=text)
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="artifact: all exits of this artifact too")
    parser.add_argument("--link", action="store_true", help="hf: link the model's weights instead of copying them")
    parser.add_argument(
        "--check",
        action="store_true",
        help="hf: print how far the logits of every exit are from this project's; exit code 1 above the tolerance",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="hf: what to compare them on; default some Python source"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="X",
        help="hf: largest logit difference allowed (default %(default)s)",
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        metavar="FOLDER",
        help="an exit-heads artifact, an export, a run's checkpoint or a run folder; or any model's folder or GGUF file",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle whatever a Megatron checkpoint asks for; it may run anything",
    )


COMMANDS = (
    Command(
        name="convert",
        summary="put initialized exit heads on a model; writes an artifact beside it, the model stays as it is",
        examples="""\
  ee-tuning convert --model Llama-2-7b-hf --exit-layers 8,16,24 --output exits/llama-2-7b
  ee-tuning convert --model Llama-2-7b-hf --exit-layers 8,16 --architecture adapter,mlp --exit-output tied --output exits/small
  torchrun --nproc-per-node 4 -m ee_tuning convert job.yaml --pipeline-model-parallel-size 4 --output exits/llama-2-7b
  ee-tuning convert --model megatron_run/iter_0040000 --exit-layers 8,16 --output exits/mine
  ee-tuning convert --model ee_llm_checkpoint --output exits/ee_llm
  ee-tuning convert --model Llama-2-7b-hf --exit-layers 8,16,24 --init fitted --data corpus.jsonl --output exits/fitted
  ee-tuning convert --model Llama-3.1-8B --exit-layers 8,16,24 --output-vocab auto --data corpus.jsonl --output exits/short

The bytes written do not depend on the number of processes. Without --exit-layers, an EE-LLM checkpoint's own exits are written.
--init fitted runs the whole model over --data (--fit-tokens of it), in one process or many; without it no more is read than is copied.
--output-vocab counts the tokens of --data.""",
        add_arguments=_add_convert,
        run=convert,
    ),
    Command(
        name="inspect",
        summary="tell what a model folder or an exit-heads artifact holds",
        examples="""\
  ee-tuning inspect Llama-2-7b-hf
  ee-tuning inspect --model folder_with_a_config_json --json
  ee-tuning inspect runs/llama-2-7b/exit_heads --json""",
        add_arguments=_add_inspect,
        run=inspect,
    ),
    Command(
        name="profile",
        summary="tell how far each layer turns the hidden states of a text, and where exits would go by it",
        examples="""\
  ee-tuning profile --model Llama-2-7b-hf --num-exits 8
  ee-tuning profile --model Llama-2-7b-hf --text sample.txt --output pictures/llama-2-7b.png --json

Runs in one process, one layer at a time.
`convert` and `tune` place exits by it themselves with --exit-layers auto:8:profile.""",
        add_arguments=_add_profile,
        run=profile,
    ),
    Command(
        name="export",
        summary="write exits, or a model with its exits, in another form",
        examples="""\
  ee-tuning export --format artifact --exits runs/llama-2-7b/exit_heads --only 8,16 --output exits/two
  ee-tuning export --format artifact --exits exits/two --merge exits/deep --output exits/all
  ee-tuning export --format artifact --exits exits/two --model Llama-2-7b-hf --add 24 --output exits/three
  ee-tuning export --format hf --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --output llama-2-7b-early --link --check
  torchrun --nproc-per-node 4 -m ee_tuning export --format megatron --model Llama-2-7b-hf --exits exits/two --output llama-2-7b-dist
  ee-tuning export --format hf --model megatron_run/iter_0040000 --tokenizer Llama-2-7b-hf --output llama-2-7b-mine

hf: transformers loads the folder as the plain model, and with trust_remote_code=True as one whose generate takes exit_threshold=0.8.
megatron: stock Megatron-core loads the model at any tensor × pipeline size and leaves the exits alone.
artifact: what is put together must be of one model and one kind of output; heads may differ.
--add takes --architecture for the new exits.""",
        add_arguments=_add_export,
        run=export,
    ),
    Command(
        name="verify",
        summary="check every file of an artifact, an export, a run or a model",
        examples="""\
  ee-tuning verify runs/llama-2-7b/exit_heads
  ee-tuning verify runs/llama-2-7b
  ee-tuning verify Llama-2-7b-hf

One line per file; the first that is missing or altered is named and ends it with exit code 2. What this project wrote is checked against
its sha256. Another's model is checked as far as its format goes (headers, index, sizes, a Megatron checkpoint's own checksums, NaN, whether
the tensors are the model's), and what can not be checked is told; exit code 1 where it holds NaN or infinity.
Commands that load exits, or a model with a manifest, check them too; --no-verify spares the reading.""",
        add_arguments=_add_verify,
        run=verify,
    ),
)
