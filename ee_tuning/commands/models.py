"""Commands on models and exits on disk."""

import argparse
from pathlib import Path

from ee_tuning.commands.command import Command, add_job, job_of, with_measured_layers
from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError

_OF_TEXTS = ("data.paths", "data.chat_template", "tuning.fit_tokens", "tuning.seq_length", "tuning.micro_batch_size")
"""Keys of convert's flags that concern the texts of new exits."""


def convert(args: argparse.Namespace) -> None:
    """Writes an exit-heads artifact for a backbone."""
    config = job_of(args)
    _check_convert(args, config)
    if args.eagle3 is not None:
        from ee_tuning.export.import_eagle3 import import_eagle3

        import_eagle3(config, args.eagle3, args.output, overwrite=args.overwrite)
        return
    if args.widen is not None:
        from ee_tuning.export.widen_vocab import widen_vocab

        widen_vocab(config, args.widen, args.output, args.token_ids, overwrite=args.overwrite)
        return
    if config.exits.init == "fitted" or config.exits.output_vocab:
        from ee_tuning.tuning.command import convert_by_texts as convert
    else:
        from ee_tuning.artifact.convert import convert
    convert(with_measured_layers(config), args.output, overwrite=args.overwrite)


def _check_convert(args: argparse.Namespace, config: Config) -> None:
    """Raises InputError where flags of new heads meet a head that exists (--eagle3, --widen), or other new heads."""
    made = [
        key
        for key in sorted(args.overrides)
        if key.startswith(("exits.", "data.", "tuning.")) and key != "exits.verify"
    ]
    if args.eagle3 is not None and args.widen is not None:
        raise InputError("--eagle3 and --widen exclude each other; import the head first, and widen the artifact")
    if args.eagle3 is not None and made:
        raise InputError(f"--eagle3 takes a head as it is, and {', '.join(made)} is of new ones; leave one of them out")
    if args.token_ids is not None and args.widen is None:
        raise InputError(
            "--token-ids goes with --widen FOLDER, whose list they join; give it, or leave --token-ids out"
        )
    if args.widen is None:
        if args.eagle3 is None:
            _check_new(args, config)
        return
    if of_new := [key for key in made if key.startswith("exits.") and key != "exits.output_vocab"]:
        raise InputError(
            f"--widen keeps heads as they are, and {', '.join(of_new)} is of new ones; leave one of them out"
        )
    if of_a_fit := [key for key in made if key in ("tuning.fit_tokens", "tuning.micro_batch_size")]:
        raise InputError(
            f"--widen counts the tokens of texts and runs no model, and {', '.join(of_a_fit)} is of a fit; leave it out"
        )
    if args.token_ids is not None and made:
        raise InputError(
            f"--token-ids names the tokens that join a list, and {', '.join(made)} chooses them by texts; leave one of "
            "them out"
        )


def _check_new(args: argparse.Namespace, config: Config) -> None:
    """Raises InputError where a flag is for other new heads than those asked for."""
    from ee_tuning.artifact.begun_exits import check_new_exits

    check_new_exits(config.exits, args.overrides)
    plain = load_config(None, {})
    unread = [key for key in sorted(args.overrides) if key in _OF_TEXTS and _value(config, key) != _value(plain, key)]
    if unread and config.exits.init != "fitted" and not config.exits.output_vocab:
        raise InputError(
            f"{unread[0]} is for exits that are made from texts, and copied or random ones need none; give --init fitted "
            "or --output-vocab N, or leave it out"
        )


def _value(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def inspect(args: argparse.Namespace) -> None:
    """Describes a model or an artifact."""
    from ee_tuning.artifact.inspect import inspect_path

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
    from ee_tuning.export.command import export

    return export(load_config(args.config, args.overrides), args)


def verify(args: argparse.Namespace) -> int:
    """Verifies files. Returns 1 where a model holds NaN or infinity."""
    from ee_tuning.checkpoint.verify import verify_folder

    return 0 if verify_folder(args.path, trust_pickle=args.trust_pickle) else 1


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "convert")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder for the exit-heads artifact"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an exit-heads artifact that is already there")
    parser.add_argument(
        "--eagle3", type=Path, metavar="FOLDER", help="take a published EAGLE-3 head, of vLLM's layout or speculators'"
    )
    parser.add_argument(
        "--widen",
        type=Path,
        metavar="FOLDER",
        help="take the exits or the drafting head of this artifact, and make its shortlist --output-vocab tokens long: the most "
        "frequent ones of --data join it",
    )
    parser.add_argument(
        "--token-ids",
        type=Path,
        metavar="FILE",
        help="--widen: the tokens of this JSON list, or of another artifact's exit_vocab.json, join it instead",
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        metavar="FOLDER",
        help="a model's folder (Hugging Face, Megatron), possibly with only its config.json, a GGUF file, or a name on the "
        "Hugging Face hub; or an exit-heads artifact",
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the same, by the flag of other commands")
    parser.add_argument(
        "--config", metavar="FILE", help="shape of a Megatron checkpoint whose saved arguments are incomplete"
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle a Megatron checkpoint without restrictions; it may run any code",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "profile")
    parser.add_argument(
        "--num-exits", type=int, default=3, metavar="N", help="how many exits to place (default %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("profile.png"),
        metavar="FILE",
        help="file for the picture (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "export")
    parser.add_argument(
        "--format",
        required=True,
        choices=("artifact", "hf", "megatron", "draft", "pruned", "eagle3", "speculators"),
        help="artifact: only exits. hf: the model with its exits, as a folder for transformers. "
        "megatron: the same as a distributed checkpoint of Megatron-core. draft: one exit as a plain model, to draft for the whole "
        "model in vLLM, SGLang and other engines. pruned: the same, described as a model of its own. eagle3: a drafting head, as vLLM and "
        "SGLang load it. speculators: the same as `vllm serve FOLDER` loads it",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the export")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an export of the same format that is already there"
    )
    for flag, text in (
        ("--only", "artifact: keep only the exits of --exits after these layers"),
        ("--drop", "artifact: leave out the exits of --exits after these layers"),
        ("--add", "artifact: add new exits after these layers, initialized from --model as by convert"),
    ):
        parser.add_argument(flag, nargs="+", default=[], metavar="N", help=text)
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="artifact: add all exits of this artifact")
    parser.add_argument(
        "--exit", type=int, metavar="N", help="draft, pruned: write the exit of --exits after this layer (required)"
    )
    parser.add_argument(
        "--fold-bias",
        action="store_true",
        help="draft, pruned: fold the bias of an exit's linear map into the output matrix by a direction of --text, which is not exact",
    )
    parser.add_argument("--link", action="store_true", help="hf: link the model's weights instead of copying them")
    parser.add_argument(
        "--check",
        action="store_true",
        help="hf, draft, pruned: compare the logits of every exit with this project's; exit code 1 above the tolerance",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="hf, draft, pruned: text to compare them on; default some Python source",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="hf, draft, pruned: largest logit difference allowed (default 0.001, of a plain model 0.0001 in float32)",
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
        help="unpickle a Megatron checkpoint without restrictions; it may run any code",
    )


COMMANDS = (
    Command(
        name="convert",
        summary="create initialized exit heads for a model, as an artifact beside it; the model is unchanged",
        examples="""\
  ee-tuning convert --model Llama-2-7b-hf --exit-layers 8,16,24 --output exits/llama-2-7b
  ee-tuning convert --model Llama-2-7b-hf --exit-layers 8,16 --architecture adapter,mlp --exit-output tied --output exits/small
  torchrun --nproc-per-node 4 -m ee_tuning convert job.yaml --pipeline-model-parallel-size 4 --output exits/llama-2-7b
  ee-tuning convert --model megatron_run/iter_0040000 --exit-layers 8,16 --output exits/mine
  ee-tuning convert --model ee_llm_checkpoint --output exits/ee_llm
  ee-tuning convert --model Llama-3.1-8B --eagle3 EAGLE3-LLaMA3.1-8B --output exits/eagle3
  ee-tuning convert --model Llama-2-7b-hf --exit-layers 8,16,24 --init fitted --data corpus.jsonl --output exits/fitted
  ee-tuning convert --model Llama-3.1-8B --exit-layers 8,16,24 --output-vocab auto --data corpus.jsonl --output exits/short
  ee-tuning convert --model Llama-3.1-8B --widen exits/short --output-vocab 16384 --data code.jsonl --output exits/with_code

The bytes written do not depend on the number of processes. Without --exit-layers, an EE-LLM checkpoint's own exits are written.
--init fitted runs the whole model over --data (--fit-tokens of it), in any number of processes. Otherwise only copied tensors are read.
--output-vocab counts the tokens of --data.""",
        add_arguments=_add_convert,
        run=convert,
    ),
    Command(
        name="inspect",
        summary="describe a model or an exit-heads artifact",
        examples="""\
  ee-tuning inspect Llama-2-7b-hf
  ee-tuning inspect --model folder_with_a_config_json --json
  ee-tuning inspect runs/llama-2-7b/exit_heads --json""",
        add_arguments=_add_inspect,
        run=inspect,
    ),
    Command(
        name="profile",
        summary="measure how far each layer turns the hidden states of a text, and place exits by it",
        examples="""\
  ee-tuning profile --model Llama-2-7b-hf --num-exits 8
  ee-tuning profile --model Llama-2-7b-hf --text sample.txt --output pictures/llama-2-7b.png --json

Runs in one process, one layer at a time.
With --exit-layers auto:8:profile, `convert` and `tune` place exits in the same way.""",
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
  ee-tuning export --format speculators --model Llama-3.1-8B --exits runs/draft/exit_heads --output llama-3.1-8b-eagle3
  ee-tuning export --format draft --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --exit 8 --output llama-2-7b-draft --check

hf: transformers loads the plain model, or, with trust_remote_code=True, a model whose generate accepts exit_threshold=0.8.
draft, pruned: a plain folder of the first layers. Exits of architecture norm, linear, mlp and layer are such models.
Its README.md has the commands for vLLM, SGLang, TensorRT-LLM, llama.cpp and transformers.
megatron: stock Megatron-core loads the model at any tensor × pipeline size and ignores the exits.
artifact: merged exits must belong to one model and have the same kind of output; heads may differ.
--add uses --architecture for the new exits.""",
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

It prints one line per file, and stops with exit code 2 at the first that is missing or altered. This project's files have sha256 sums.
Other models are checked as far as their format allows (headers, index, sizes, a Megatron checkpoint's checksums, NaN, whether the tensors
are the model's), with a note of what can not be checked. The exit code is 1 where a model holds NaN or infinity.
Commands that load exits, or a model with a manifest, verify them, too, unless --no-verify is given.""",
        add_arguments=_add_verify,
        run=verify,
    ),
)
