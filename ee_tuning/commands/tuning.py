"""Commands that tune."""
import argparse

from ee_tuning.commands.command import Command, add_job, job_of


def tune(args: argparse.Namespace) -> None:
    """Backbone and artifact (or what to convert) -> run folder with the tuned artifact."""
    config = job_of(args)
    from ee_tuning.tuning.tuner import tune

    tune(config)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    add_job(parser, "tune")


COMMANDS = (
    Command(name="tune", summary="train the exit heads alone; the model is frozen and nothing flows backward through it",
            examples="""\
  ee-tuning tune --model Llama-2-7b-hf --exits exits/llama-2-7b --data corpus.jsonl --output runs/llama-2-7b
  torchrun --nproc-per-node 8 -m ee_tuning tune job.yaml --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4
  torchrun --nproc-per-node 8 -m ee_tuning tune job.yaml --resume

Without --exits it converts by itself from --exit-layers, --architecture, --init and --exit-output.
The tuned artifact is OUTPUT/exit_heads.""", add_arguments=_add_tune, run=tune),
)
