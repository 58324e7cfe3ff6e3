"""The saving by a shortlist for an exit that is asked in vain, and its cost in tokens that can not leave.

    python benchmarks/shortlist.py --model SmolLM2-135M-Instruct.Q4_1.gguf  # measured
    python benchmarks/shortlist.py --shapes  # computed, for the shapes of examples/*/config.json

Exits are fitted by least squares on documentation strings of Python's standard library; every fifth string is held out.
For each size of the list: the share of held-out tokens that is listed; milliseconds for asking an exit, and its share
of a full pass (the mean over exits, the fastest of --repeats times); the share of tokens on which the exits agree with
the full model; and, at thresholds that one half of the held-out text chooses so that tokens that leave are the full
model's with probability --wanted, on the other half: tokens that leave, the agreement of all tokens, and the speed-up
of decoding over full depth, the same prompts and engine, taken in turns.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measured_costs import measure_costs
from torch import Tensor

from ee_tuning.artifact.convert import write_initial_exits
from ee_tuning.artifact.load import load_for_fitting
from ee_tuning.calibration.calibrate import CalibrationResult, ExitObservations, choose, read_exits, score_thresholds
from ee_tuning.checkpoint.formats import read_shape
from ee_tuning.config import Config, load_config, replace
from ee_tuning.data.frequent_tokens import list_tokens
from ee_tuning.data.job_samples import load_job_samples
from ee_tuning.data.loader import batches_of_each
from ee_tuning.data.sample_corpus import documentation_strings, sample_corpus
from ee_tuning.data.splits import load_samples
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.model.fit import Fit
from ee_tuning.model.partition import final_head_cost, stage_costs
from ee_tuning.model_config.config import read_model_config
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.policy import Policy
from ee_tuning.tuning.fitting import FitPass, fit_record, fit_samples
from ee_tuning.tuning.fitting_other import OtherFit

SHAPES = ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b", "qwen2.5-7b")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "examples" / "tiny-python-llama"))
    parser.add_argument("--layers", default="8,15,22")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 8192, 0], help="0: the whole vocabulary")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--fit-tokens", type=int, default=0, help="0: as many as tune takes")
    parser.add_argument("--held-out-samples", type=int, default=24)
    parser.add_argument("--wanted", type=float, default=0.9)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", action="store_true")
    args = parser.parse_args()
    if args.shapes:
        _print_shapes(args)
        return
    print("  list  listed  ask, ms of a pass  agrees |  leave agreement speed-up", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        config = _job(args, Path(folder))
        _write_all(config, Path(folder), args.sizes)
        for size in args.sizes:
            _print_row(config, Path(folder) / f"exits-{size}", args, size)


def _write_all(config: Config, folder: Path, sizes: list[int]) -> None:
    """Writes exits of every size, from one pass over the texts, as `exits-N` in `folder`."""
    topology, jobs = (
        init_parallel(config.parallel),
        {size: replace(config, exits={"output_vocab": size}) for size in sizes},
    )
    model = read_shape(config.model)
    samples = load_job_samples(config, model, topology).train
    lists = {size: list_tokens(job, model, samples, topology) for size, job in jobs.items()}
    loaded = load_for_fitting(config, topology)
    fit, taken = (
        FitPass(loaded, config.tuning, topology),
        fit_samples(samples, config.tuning, loaded.model.config.hidden_size),
    )
    others = {size: OtherFit(loaded.model, listed.token_ids, topology) for size, listed in lists.items() if listed}
    fit.other = _Together(list(others.values()))  # type: ignore[assignment]
    fit.run(list(batches_of_each(samples, taken.chosen, config.tuning, dp=1, dp_rank=0)))
    maps = fit.maps(loaded.stages)
    for size, job in jobs.items():
        found = Fit(maps, fit_record(taken), others[size].row() if size in others else None)
        write_initial_exits(
            job,
            folder / f"exits-{size}",
            topology,
            make_fit=lambda _, found=found: found,  # type: ignore[misc]
            list_tokens=lambda _, size=size: lists[size],
        )  # type: ignore[misc]


class _Together:
    """Fits several rows of "any other token" in one pass."""

    def __init__(self, each: list[OtherFit]):
        self.each = each

    def add(self, final: Tensor, counts: Tensor) -> None:
        """Adds counts of tokens with these final states to each fit."""
        for other in self.each:
            other.add(final, counts)


def _job(args: argparse.Namespace, folder: Path) -> Config:
    texts = list(documentation_strings({name: source for files in sample_corpus() for name, source in files.items()}))
    for name, part in (("train", [text for index, text in enumerate(texts) if index % 5]), ("held_out", texts[::5])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8"
        )
    return load_config(
        None,
        {
            "model.path": args.model,
            "exits.exit_layers": args.layers,
            "exits.architecture": "norm",
            "exits.init": "fitted",
            "data.paths": [str(folder / "train.jsonl")],
            "data.valid_paths": [str(folder / "held_out.jsonl")],
            "tuning.seq_length": args.length,
            "tuning.micro_batch_size": 2,
            "tuning.fit_tokens": args.fit_tokens,
        },
    )


def _print_row(config: Config, exits: Path, args: argparse.Namespace, size: int) -> None:
    llm = EarlyExitLLM.from_config(replace(config, exits={"path": str(exits)}))
    model = llm.model
    samples = load_samples(
        config.data,
        config.model.path,
        seq_length=args.length,
        vocab_size=model.config.vocab_size,
        max_positions=model.config.max_position_embeddings,
    ).valid
    assert samples is not None
    rows = [torch.from_numpy(samples.sample(index).tokens) for index in range(min(len(samples), args.held_out_samples))]
    tokens, listed = torch.cat([row[1:] for row in rows]), set(model.plan.token_ids)
    share = sum(token in listed for token in tokens.tolist()) / len(tokens) if listed else 1.0
    half = len(rows) // 2
    with torch.inference_mode():
        chosen_on, judged_on = (read_exits(model, [row[:-1] for row in part]) for part in (rows[:half], rows[half:]))
    thresholds = choose(chosen_on, "max_probability", args.wanted)
    outcome = score_thresholds(judged_on, "max_probability", thresholds)
    policy = Policy(thresholds={layer: value for layer, value in thresholds.items() if value is not None})
    prompts = [llm.tokenizer.decode(row[:64].tolist()) for row in rows[half : half + args.prompts]]
    speed_up = _speed_up(llm, prompts, policy, args)
    assert llm.engine is not None
    costs = [measure_costs(llm.engine.stage) for _ in range(args.repeats)]
    ask = min(_mean(each.of_head(layer, 1) for layer in each.heads) for each in costs)
    whole = min(each.of_all(1) for each in costs)
    print(
        f"{size or model.config.vocab_size:6d} {share:7.3f} {1e3 * ask:8.2f} {ask / whole:9.3f} {_agreement(judged_on):7.3f} | "
        f"{1 - _stay(outcome):6.3f} {outcome.agreement:9.3f} {speed_up:8.2f}",
        flush=True,
    )


def _speed_up(llm: EarlyExitLLM, prompts: list[str], policy: Policy, args: argparse.Namespace) -> float:
    """Returns the time of full depth ÷ the time by `policy`; of each prompt the fastest of some rounds counts."""
    seconds = {"full": 0.0, "early": 0.0}
    keys = {"max_new_tokens": args.new_tokens, "ignore_eos": True, "temperature": 0.0, "reuse_prefixes": False}
    for prompt in prompts:
        rounds = [
            {
                name: llm.generate([prompt], policy=[way], **keys)[0].seconds
                for name, way in (("full", Policy()), ("early", policy))
            }
            for _ in range(args.repeats)
        ]
        for name in seconds:
            seconds[name] += min(each[name] for each in rounds)
    return seconds["full"] / seconds["early"]


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _agreement(readings: ExitObservations) -> float:
    return _mean(float(readings.agrees[layer].double().mean()) for layer in readings.exit_layers)


def _stay(outcome: CalibrationResult) -> float:
    """Returns the share of tokens that do not leave early."""
    stay = 1.0
    for result in outcome.exits.values():
        stay *= 1 - result.share
    return stay


def _print_shapes(args: argparse.Namespace) -> None:
    """Prints the multiply-adds of asking an exit, as a share of a full pass over one token, and its share of the
    model's parameters.
    """
    print(f"{'model':14} {'vocabulary':>10} " + " ".join(f"{size or 'all':>7}" for size in args.sizes))
    for name in SHAPES:
        model = read_model_config(Path(__file__).parents[1] / "examples" / name)
        whole = sum(stage_costs(model, model.num_layers, (), 0, trains_heads=False, has_final_head=True))
        shares = [
            final_head_cost(model) * ((size + 1) / model.vocab_size if size else 1) / whole for size in args.sizes
        ]
        print(f"{name:14} {model.vocab_size:10,} " + " ".join(f"{share:7.2%}" for share in shares))


if __name__ == "__main__":
    init_parallel(load_config(None).parallel)
    main()
