"""Exits as draft models, and drafting heads, in the real vLLM, on the CPU: the tokens of plain greedy decoding, and as
many drafts accepted as our own model foretells.

`make test-engines` installs the environment of the engines and runs this; anything else skips it, for it takes most of
an hour. A head for SmolLM2 takes hours of tuning: EE_TUNING_EAGLE3_HEAD names one, the artifact of a run of
`ee-tuning tune --architecture eagle3`, and without it the claims about that head are skipped.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import prompt_texts
from rich.console import Console
from vllm_processes import ENGINES, ROOT, runs_of, served

from ee_tuning import cli
from ee_tuning.artifact.load import load_for_generation
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.data.indexed import write_index
from ee_tuning.data.sample_corpus import documentation_strings, sample_corpus
from ee_tuning.data.tokenizer import load_tokenizer
from ee_tuning.demo.demo_model import smollm2
from ee_tuning.evaluation.acceptance import acceptance, agreement
from ee_tuning.export.draft_card import NUM_DRAFTS
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.parallel.topology import init_parallel
from ee_tuning.sampling.params import SamplingParams

pytestmark = [
    pytest.mark.skipif(not ENGINES, reason="`make test-engines` runs it, with the engines' environment"),
    pytest.mark.timeout(7200),
]
LAYERS = {"tiny": (2, 3, 4), "smollm2": (6, 12, 18)}
KINDS = ("norm", "mlp", "layer")
"""The exit after each of these layers."""
PROMPTS = {
    "tiny": ["import os\n\ndef main():\n    ", "class Stack:\n    def __init__(self", 'def fibonacci(n):\n    """'],
    "smollm2": ["What is the capital of Italy?", "Tell me about the moon.", "Name three uses of a brick."],
}
NUM_PROMPTS, NUM_STEPS = 16, 3
"""Prompts of a drafting head, and the tokens that it drafts. With 96 new tokens each there are about a thousand rounds,
in which a share has a deviation of 0.016.
"""


@dataclass(frozen=True)
class Model:
    """A model, and a folder for what is made of it."""

    name: str
    path: Path
    folder: Path

    def layer_of(self, kind: str) -> int:
        return dict(zip(KINDS, LAYERS[self.name], strict=True))[kind]


@dataclass(frozen=True)
class Drafted:
    """Drafters of a model, and what vLLM makes of them."""

    source: Path
    """The artifact of which they are."""
    texts: list[str]
    """The prompts of `job`."""
    job: dict[str, Any]
    runs: dict[str, Any]
    """The run `plain`, and one for each drafter."""

    @property
    def plain(self) -> list[list[int]]:
        tokens: list[list[int]] = self.runs["plain"]["tokens"]
        return tokens


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The shipped model or SmolLM2, and texts to fit and tune on."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    path = ROOT / "examples" / "tiny-python-llama" if name == "tiny" else folder / "model"
    if name == "smollm2":
        cache = ROOT / "runs" / "demo-llm" / "package"
        cache.parent.mkdir(parents=True, exist_ok=True)
        run("export", "--format", "hf", "--model", smollm2(cache, Console()), "--output", path)
    texts = [json.dumps({"text": text}) for text in documentation_strings(sample_corpus()[0])][:400]
    (folder / "text.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return Model(name, path, folder)


@pytest.fixture(scope="module")
def exits(model: Model) -> Drafted:
    """Fitted exits of three kinds, each as a draft model."""
    folder, layers = model.folder / "exits", ",".join(map(str, LAYERS[model.name]))
    words = ["--model", model.path, "--exit-layers", layers, "--architecture", ",".join(KINDS), "--init", "fitted"]
    run("convert", *words, "--data", model.folder / "text.jsonl", "--fit-tokens", 8000, "--output", folder)
    ways = {}
    for kind in KINDS:
        draft = as_model(model, folder, kind, "draft")
        ways[kind] = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": NUM_DRAFTS}
    texts = rendered(load_tokenizer(model.path), PROMPTS[model.name])
    job = job_of(model, texts, ways, max_tokens=64, max_model_len=512)
    return Drafted(folder, texts, job, runs_of(job, model.folder))


@pytest.fixture(scope="module")
def head(model: Model) -> Drafted:
    """An EAGLE-3 head in both layouts."""
    source, ways = eagle3_head(model), {}
    for layout in ("eagle3", "speculators"):
        folder = model.folder / layout
        run("export", "--format", layout, "--model", model.path, "--exits", source, "--output", folder)
        ways[layout] = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": NUM_STEPS}
    texts = prompt_texts(load_tokenizer(model.path), NUM_PROMPTS)
    job = job_of(model, texts, ways, max_tokens=96, max_model_len=1024)
    return Drafted(source, texts, job, runs_of(job, model.folder))


@pytest.fixture(scope="module")
def head_rates(model: Model, head: Drafted) -> Sequence[float]:
    """The head's acceptance rates, draft by draft, by our own validation on the plain answers."""
    return validated(model, head.source, head.job["prompts"], head.plain)


def run(*words: object) -> None:
    assert cli.main(list(map(str, words))) == 0


def rendered(tokenizer: Any, prompts: list[str]) -> list[str]:
    """Prompts as the model wants them: chats by its template, where it has one."""
    if not tokenizer.chat_template:
        return prompts
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]


def as_model(model: Model, exits: Path, kind: str, layout: str) -> Path:
    """An exit as a plain model."""
    folder = model.folder / f"{layout}_{kind}"
    words = ["--model", model.path, "--exits", exits, "--exit", model.layer_of(kind), "--output", folder]
    run("export", "--format", layout, *words)
    return folder


def eagle3_head(model: Model) -> Path:
    """A head for the shipped model, tuned for a minute, or the given one for SmolLM2."""
    if model.name == "smollm2":
        if not (given := os.environ.get("EE_TUNING_EAGLE3_HEAD", "")):
            pytest.skip("tuning a head for it takes hours on a CPU; EE_TUNING_EAGLE3_HEAD names a tuned one")
        return Path(given)
    folder = model.folder / "tuned"
    words = ["--model", model.path, "--architecture", "eagle3", "--loss", "lk", "--data", model.folder / "text.jsonl"]
    words += ["--train-iters", 60, "--lr", 2e-3, "--seq-length", 320, "--micro-batch-size", 1, "--global-batch-size", 4]
    run("tune", *words, "--set", "tuning.eval_iters=0", "--output", folder)
    return folder / "exit_heads"


def job_of(model: Model, texts: list[str], ways: dict[str, Any], **limits: int) -> dict[str, Any]:
    """A job of benchmarks/vllm_runs.py: plain, then each way to draft."""
    tokenizer = load_tokenizer(model.path)
    return {
        "model": str(model.path),
        "prompts": [tokenizer(text)["input_ids"] for text in texts],
        "batches": [1],
        "enforce_eager": True,
        "runs": {"plain": {}, **{name: {"speculative": way} for name, way in ways.items()}},
        **limits,
    }


def foretold(model: Model, exits: Drafted, kind: str) -> Sequence[float]:
    """Acceptance rates of an exit's drafts, counted on the plain answers."""
    keys = {"model.path": str(model.path), "exits.path": str(exits.source), "model.dtype": "float32"}
    loaded = load_for_generation(load_config(None, keys), init_parallel(ParallelSection()))
    pairs = zip(exits.job["prompts"], exits.plain, strict=True)
    agreements = [agreement(loaded, model.layer_of(kind), prompt, answer) for prompt, answer in pairs]
    return acceptance(agreements, NUM_DRAFTS).rates


def validated(model: Model, source: Path, prompts: list[list[int]], answers: list[list[int]]) -> Sequence[float]:
    """Acceptance rates of a head by the validation before a run's first step, on these very tokens."""
    length = write_answers(model.folder / "answers", prompts, answers)
    words = ["--model", model.path, "--exits", source, "--loss", "lk", "--data", model.folder / "text.jsonl"]
    words += ["--seq-length", length, "--micro-batch-size", 1, "--global-batch-size", 1, "--train-iters", 1]
    keys = {"data.valid_paths": f"[{model.folder / 'answers'}]", "tuning.ttt_steps": NUM_STEPS}
    settings = {**keys, "tuning.eval_iters": len(prompts), "model.dtype": "float32"}
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    run("tune", *words, "--output", model.folder / "validated")
    lines = (model.folder / "validated" / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if "acceptance_rate_1" in line]
    assert records[0]["step"] == 0
    rates = [records[0][f"acceptance_rate_{step}"] for step in range(1, NUM_STEPS + 1)]
    return [float(next(iter(rate.values())) if isinstance(rate, dict) else rate) for rate in rates]


def write_answers(prefix: Path, prompts: list[list[int]], answers: list[list[int]]) -> int:
    """Writes PREFIX.bin with .idx and .mask, of whose labels the answers alone count, and returns the length of samples
    that see one of them each, as vLLM does: all are filled up to the longest. As text they might be other tokens.
    """
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids, counts = np.zeros((2, len(prompts) * length + 1), np.int32)  # the last label has a place, too
    for start, prompt, answer in zip(range(0, len(ids), length), prompts, answers, strict=False):
        begin, stop = start + len(prompt), start + len(prompt) + len(answer)
        ids[start:stop] = [*prompt, *answer]
        counts[begin:stop] = 1
    ids.tofile(f"{prefix}.bin")
    counts.astype(np.uint8).tofile(f"{prefix}.mask")
    write_index(Path(f"{prefix}.idx"), ids.dtype, np.array([len(ids)]))
    return length


def check_rates(model: Model, name: str, counted: dict[str, Any], rates: Sequence[float]) -> None:
    """Asserts that vLLM's counters are the foretold `rates`, and prints both."""
    found = [count / counted["rounds"] for count in counted["by_position"]]
    length = f"length {1 + sum(found):.2f} in {counted['rounds']:.0f} rounds, foretold {1 + sum(rates):.2f}"
    print(f"{model.name}, {name}: {length}; {found}, {rates}")
    assert max(abs(a - b) for a, b in zip(found, rates, strict=True)) <= 0.05, (found, rates)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_changes_no_token_and_is_accepted_as_foretold(model: Model, exits: Drafted, kind: str) -> None:
    """A draft that vLLM reads as another model than the exit: tokens stay, and the speed goes."""
    rates = foretold(model, exits, kind)
    assert rates[0] > 0, "else the claim is empty"
    assert exits.runs[kind]["tokens"] == exits.plain
    check_rates(model, kind, exits.runs[kind]["drafts"], rates)


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_an_eagle3_head_is_accepted_as_its_validation_foretells(
    model: Model, head: Drafted, head_rates: Sequence[float], layout: str
) -> None:
    """States of other layers, a step too few, a vocabulary mapped wrongly: tokens stay, and no draft is accepted."""
    assert head_rates[0] > 0.1, "else the claim is empty"
    assert head.runs[layout]["tokens"] == head.plain
    check_rates(model, layout, head.runs[layout]["drafts"], head_rates)


def test_vllm_says_what_our_engine_says(model: Model, exits: Drafted) -> None:
    """Two engines that read the same folder differently."""
    assert ours(model, exits, policy="full") == exits.plain


def ours(model: Model, exits: Drafted, **options: Any) -> list[list[int]]:
    """The answers of this project's engine to the same prompts."""
    llm = EarlyExitLLM.load(model.path, exits.source, dtype="float32")
    params = SamplingParams(max_tokens=exits.job["max_tokens"], ignore_eos=True)
    return [answer.token_ids for answer in llm.generate(exits.texts, params, **options)]


@pytest.mark.parametrize("kind", [*KINDS, "eagle3"])
def test_two_tensor_parallel_ranks(model: Model, kind: str, request: pytest.FixtureRequest) -> None:
    """A draft whose matrices do not cut as the model's do."""
    if model.name == "smollm2":
        pytest.skip("9 heads do not go into 2 ranks")
    drafted: Drafted = request.getfixturevalue("head" if kind == "eagle3" else "exits")
    draft = {**drafted.job["runs"][kind]["speculative"], "draft_tensor_parallel_size": 2}
    runs = {"two": {"speculative": draft, "tensor_parallel_size": 2}}
    two, one = runs_of({**drafted.job, "runs": runs}, model.folder)["two"], drafted.runs[kind]
    assert two["tokens"] == one["tokens"] == drafted.plain
    assert two["drafts"]["by_position"] == one["drafts"]["by_position"]


def test_vllm_serve_over_http(model: Model, exits: Drafted) -> None:
    """A folder that the class loads and the server does not: a tokenizer that is missing, a config that is refused."""
    draft = json.dumps(exits.job["runs"]["mlp"]["speculative"])
    tokens, accepted = served(exits.job, model.folder, str(model.path), "--speculative-config", draft)
    assert tokens == exits.plain
    assert accepted == exits.runs["mlp"]["drafts"]["accepted"]


def test_vllm_serve_of_a_pruned_folder_by_itself(model: Model, exits: Drafted) -> None:
    """A model in its own right that vLLM reads as another one than the exit."""
    folder = as_model(model, exits.source, "layer", "pruned")
    tokens, _ = served(exits.job, model.folder, str(folder))
    assert tokens == ours(model, exits, policy="fixed", exit_layer=model.layer_of("layer"))
    assert tokens != exits.plain, "else the claim is empty"


def test_vllm_serve_of_a_speculators_folder_by_itself(model: Model, head: Drafted) -> None:
    """A folder whose model, or whose number of drafts, the server does not find."""
    tokens, accepted = served(head.job, model.folder, str(model.folder / "speculators"))
    assert tokens == head.plain
    # The server reads what prompts share from its cache, and the class computes it anew.
    assert accepted == pytest.approx(head.runs["speculators"]["drafts"]["accepted"], rel=0.01)
