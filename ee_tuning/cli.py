"""`ee-tuning COMMAND`: the table of commands. Each imports what it needs when it runs, so that `--help` answers at once.

What the user did wrong ends in one line on stderr and exit code 2; anything else that goes wrong is a bug and keeps its traceback.
"""
import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ee_tuning import __version__
from ee_tuning.config import Config, load_config
from ee_tuning.errors import InputError
from ee_tuning.flags import add_config_flags


@dataclass(frozen=True, kw_only=True)
class Command:
    """One row of the table."""

    name: str
    summary: str
    """One line, for `ee-tuning --help`."""
    examples: str
    """Shown after the flags."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def convert(args: argparse.Namespace) -> None:
    """Backbone -> exit-heads artifact."""
    config = _job(args)
    from ee_tuning.checkpoint.convert import convert

    convert(config, args.output, overwrite=args.overwrite)


def tune(args: argparse.Namespace) -> None:
    """Backbone and artifact (or what to convert) -> run folder with the tuned artifact."""
    config = _job(args)
    from ee_tuning.tuning.tuner import tune

    tune(config)


def generate(args: argparse.Namespace) -> None:
    """Prompts -> completions."""
    config = _job(args)
    if not args.prompt:
        raise InputError("generate needs a prompt, got none; give --prompt TEXT, or --prompt - to read standard input")
    from ee_tuning.generation.command import generate

    generate(config, args.prompt, as_json=args.json, show_exits=args.show_exits)


def inspect(args: argparse.Namespace) -> None:
    """What a folder holds."""
    from ee_tuning.checkpoint.inspect import inspect_path

    inspect_path(args.path, as_json=args.json, config=args.config, trust_pickle=args.trust_pickle)


def demo(args: argparse.Namespace) -> None:
    """The whole way with the shipped model."""
    from ee_tuning.evaluation.demo import demo

    demo(args.output)


def _add_job(parser: argparse.ArgumentParser, command: str) -> None:
    parser.usage = f"ee-tuning {command} [CONFIG] [flags]"  # CONFIG first: after a flag that takes several values it would be one of them
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of the job; flags and --set overrule it")
    add_config_flags(parser, command)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    _add_job(parser, "convert")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the exit-heads artifact goes")
    parser.add_argument("--overwrite", action="store_true", help="replace an exit-heads artifact that is already there")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    _add_job(parser, "tune")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_job(parser, "generate")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to go on from; repeatable; - reads standard input")
    parser.add_argument("--show-exits", action="store_true", help="colour each token by the exit it left at")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of text")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FOLDER", help="a model's folder (Hugging Face, Megatron) or an exit-heads artifact")
    parser.add_argument("--config", metavar="FILE", help="shape of a Megatron checkpoint whose saved arguments lack something")
    parser.add_argument("--trust-pickle", action="store_true", help="unpickle whatever a Megatron checkpoint asks for; it may run anything")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="FOLDER",
                        help="where the artifacts, report.json and the picture go (default %(default)s)")


COMMANDS = (
    Command(name="demo", summary="see the whole way in a few minutes: convert, tune and decode the small model that ships with this",
            examples="""\
  ee-tuning demo
  ee-tuning demo --output /tmp/demo""", add_arguments=_add_demo, run=demo),
    Command(name="convert", summary="put initialized exit heads on a model; writes an artifact beside it, the model stays as it is",
            examples="""\
  ee-tuning convert --model Llama-2-7b-hf --exit-layers 8,16,24 --output exits/llama-2-7b
  torchrun --nproc-per-node 4 -m ee_tuning convert job.yaml --pipeline-model-parallel-size 4 --output exits/llama-2-7b
  ee-tuning convert --model megatron_run/iter_0040000 --exit-layers 8,16 --output exits/mine
  ee-tuning convert --model ee_llm_checkpoint --output exits/ee_llm

The bytes written do not depend on the number of processes. Without --exit-layers, an EE-LLM checkpoint's own exits are written.""",
            add_arguments=_add_convert, run=convert),
    Command(name="tune", summary="train the exit heads alone; the model is frozen and nothing flows backward through it",
            examples="""\
  ee-tuning tune --model Llama-2-7b-hf --exits exits/llama-2-7b --data corpus.jsonl --output runs/llama-2-7b
  torchrun --nproc-per-node 8 -m ee_tuning tune job.yaml --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4
  torchrun --nproc-per-node 8 -m ee_tuning tune job.yaml --resume

Without --exits it converts by itself from --exit-layers, --architecture, --init and --exit-output.
The tuned artifact is OUTPUT/exit_heads.""", add_arguments=_add_tune, run=tune),
    Command(name="generate", summary="complete prompts, leaving the network early where an exit is confident enough",
            examples="""\
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt "Once upon a time" --threshold 0.8 --show-exits
  ee-tuning generate --model Llama-2-7b-hf --exits runs/llama-2-7b/exit_heads --prompt - --json < prompt.txt
  ee-tuning generate job.yaml --policy fixed --exit-layer 16 --prompt "Once upon a time" --temperature 0.7 --top-p 0.9""",
            add_arguments=_add_generate, run=generate),
    Command(name="inspect", summary="tell what a model folder or an exit-heads artifact holds",
            examples="""\
  ee-tuning inspect Llama-2-7b-hf
  ee-tuning inspect runs/llama-2-7b/exit_heads --json""", add_arguments=_add_inspect, run=inspect),
)


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are InputErrors, and which takes no abbreviated flags."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def flag_names(self) -> list[str]:
        """Every flag there is."""
        return [flag for action in self._actions for flag in action.option_strings]


def build_parser() -> _Parser:
    """The parser of every command; the chosen one's row stands in the namespace as `command`."""
    parser = _Parser(prog="ee-tuning", description="Turn a trained LLM into an early-exit LLM: convert it, tune the exits alone, "
                     "decode faster.", epilog="`ee-tuning COMMAND --help` explains a command by examples. Start with `ee-tuning demo`.")
    parser.add_argument("--version", action="version", version=f"ee-tuning {__version__}")
    rows = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        row = rows.add_parser(command.name, help=command.summary, description=command.summary[0].upper() + command.summary[1:] + ".",
                              epilog="examples:\n" + command.examples)
        command.add_arguments(row)
        row.set_defaults(command=command, parser=row)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, read. Raises InputError on what no command knows, with the nearest flag there is."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        row: _Parser = getattr(args, "parser", parser)
        near = difflib.get_close_matches(unknown[0].partition("=")[0], row.flag_names(), n=1, cutoff=0.7)
        raise InputError(f"{row.prog} takes no {unknown[0]}; " + (f"did you mean {near[0]}?" if near else f"see `{row.prog} --help`"))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns whenever a process forks after tokenizing
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if not hasattr(args, "command"):
            build_parser().print_help(sys.stderr)
            return 2
        args.command.run(args)
        sys.stdout.flush()  # here, so that a reader who left is noticed here
    except InputError as error:
        if _speaks():
            print(f"ee-tuning: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 141
    return 0


def _speaks() -> bool:
    """Whether this process prints the error: of many that met it, one; rank 0 as long as they have not joined."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return distributed.distributed_c10d._get_default_store().add("ee_tuning/error", 1) == 1
    except RuntimeError:  # the store's host has gone already
        return True


def _job(args: argparse.Namespace) -> Config:
    """The config of a command that needs a model."""
    config = load_config(args.config, args.overrides)
    if not config.model.path:
        raise InputError("model.path must name a model's folder, got none; give --model FOLDER or a config file")
    return config
