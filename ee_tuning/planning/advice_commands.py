"""The commands that `ee-tuning advise` prints: what makes each way, at the layout that the model needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from ee_tuning.checkpoint.model_card import MODEL_FOLDER
from ee_tuning.config import ModelSection, TuningSection
from ee_tuning.json_file import to_json
from ee_tuning.planning.fewest_gpus import BATCHES, FewestGpus, Split

ANSWERS = "answers.jsonl"
MOST_PROMPTS = 20_000
_TOKENS_OF_ANSWER = 500
_BATCH, _MAX_NEW_TOKENS = 32, 1024
"""Completions that `regenerate` decodes at a time, and their most tokens, by default."""
_TEXT_TOKENS = 2048
"""Tokens whose keys and values `generate` and `calibrate`, which read one text at a time, are given room for."""
_DRAFTS = 4
_FLAG_OF = {
    "exits.exit_layers": "--exit-layers",
    "exits.architecture": "--architecture",
    "exits.output": "--exit-output",
    "exits.output_vocab": "--output-vocab",
    "exits.init": "--init",
    "tuning.loss": "--loss",
    "tuning.seq_length": "--seq-length",
    "tuning.micro_batch_size": "--micro-batch-size",
    "tuning.global_batch_size": "--global-batch-size",
}
"""Flags of `tune`; other keys are given by --set."""


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Words that the commands of all ways share."""

    name: str
    """The words after `--model`."""
    served: str
    """The model as engines load it."""
    exports: tuple[str, ...] = ()
    """Commands that write `served`."""
    run: str = ""
    """Flags of `tune` for the length of its run."""
    prompts: str = f"--own-prompts {MOST_PROMPTS}"
    """Flags of `regenerate` for its prompts."""
    gpus: FewestGpus | None = None
    """Finds the layouts; without it every command is one process."""

    def split(self, job: Mapping[str, Any], depth: int, trained: int) -> Split:
        """Returns the layout of `tune`. Takes and raises what `FewestGpus.to_tune` does."""
        return self.gpus.to_tune(job, depth, trained) if self.gpus else Split()

    def tune(self, job: Mapping[str, Any], split: Split, data: str, run_folder: str) -> tuple[str, ...]:
        """Returns the tuning run of `job` {"section.key": value}."""
        flags = " ".join(f"{_FLAG_OF[key]} {value}" for key, value in job.items())
        words = f"tune --model {self.name} {flags}{self.run} --data {data} --output {run_folder}"
        return _at(split, f"{words}{split.flags}")

    def answers(self) -> tuple[str, ...]:
        """Returns the command that writes ANSWERS, the model's own, on which drafters learn."""
        split = self._decoding(0, _BATCH * _MAX_NEW_TOKENS)
        return _at(split, f"regenerate --model {self.name} {self.prompts} --output {ANSWERS}{split.flags}")

    def calibrate(self, exits: str, added: int) -> tuple[str, ...]:
        """Returns the command that writes calibration.json."""
        split = self._decoding(added, _TEXT_TOKENS)
        words = f"calibrate --model {self.name} --exits {exits} --data HELD_OUT --output calibration.json"
        return _at(split, f"{words}{split.flags}")

    def generate(self, exits: str, flags: str, added: int) -> tuple[str, ...]:
        """Returns the command that continues a prompt with exits of `added` parameters."""
        split = self._decoding(added, _TEXT_TOKENS)
        return _at(split, f'generate --model {self.name} --exits {exits} {flags}{split.flags} --prompt "…"')

    def draft(self, exits: str, layer: int, added: int) -> tuple[str, ...]:
        """Returns the commands that write an exit as a draft model, and serve it."""
        checks = " --check" if self.gpus is None or self.gpus.holds_in_float32(added) else ""
        words = f"export --format draft --model {self.name} --exits {exits} --exit {layer} --output draft{checks}"
        size = self._served_by(added)
        config: dict[str, Any] = {"method": "draft_model", "model": "draft", "num_speculative_tokens": _DRAFTS}
        if size and size > 1:
            config["draft_tensor_parallel_size"] = size
        serve = f"vllm serve {self.served}{_tensor_parallel(size)} --speculative-config {quote(to_json(config))}"
        return f"ee-tuning {words}", *self.exports, *_refusal(size), serve

    def eagle3(self, exits: str, added: int) -> tuple[str, ...]:
        """Returns the commands that write an EAGLE-3 head for vLLM, and serve it."""
        size = self._served_by(added)
        words = f"export --format speculators --model {self.served} --exits {exits} --output eagle3"
        return *self.exports, f"ee-tuning {words}", *_refusal(size), f"vllm serve eagle3{_tensor_parallel(size)}"

    def _decoding(self, added: int, tokens: int) -> Split:
        return self.gpus.to_decode(added, tokens) if self.gpus else Split()

    def _served_by(self, added: int) -> int | None:
        return self.gpus.to_serve(added) if self.gpus else 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """The length of a tuning run."""

    train_iters: int
    global_batch_size: int
    seq_length: int

    @property
    def tokens(self) -> int:
        """Number of tokens that it trains on."""
        return self.train_iters * self.global_batch_size * self.seq_length


def run_of(tuning: TuningSection, tokens: int) -> Run:
    """Returns the shortest run of at least `tokens` tokens in batches of `tuning`, whose sequence length is known."""
    step = tuning.global_batch_size * tuning.seq_length
    return Run(train_iters=-(-tokens // step), global_batch_size=tuning.global_batch_size, seq_length=tuning.seq_length)


def commands_of(
    model: ModelSection, tuning: TuningSection, run: Run, *, loads_in_engines: bool, gpus: FewestGpus | None = None
) -> Commands:
    """Returns the words for a model, and runs in the batches of `tuning`, as the user gave them.

    Engines load Hugging Face folders alone: for another model the commands write one (`loads_in_engines`).
    """
    path = quote(model.path)
    shape = f" --config {quote(model.config)}" if model.config else ""
    adapter = f" --adapter {quote(model.adapter)}" if model.adapter else ""
    name = f"{path}{shape}{adapter}{' --trust-pickle' if model.trust_pickle else ''}"
    num_prompts = min(MOST_PROMPTS, max(1, run.tokens // _TOKENS_OF_ANSWER))
    return Commands(
        name=name,
        served=path if loads_in_engines else MODEL_FOLDER,
        exports=() if loads_in_engines else (f"ee-tuning export --format hf --model {name} --output {MODEL_FOLDER}",),
        run=f" --train-iters {run.train_iters}{_batch_flags(tuning)}",
        prompts=f"--own-prompts {num_prompts}" if writes_prompts(model.path) else "--data PROMPTS",
        gpus=gpus,
    )


def writes_prompts(path: str) -> bool:
    """Whether a model can write prompts itself: False where its folder has a tokenizer and no chat template."""
    folder = Path(path)
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or (folder / "chat_template.jinja").is_file():
        return True
    try:
        return '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True


def _batch_flags(tuning: TuningSection) -> str:
    """Returns the flags of what is not the default."""
    plain = TuningSection()
    changed = {f"tuning.{key}": value for key in BATCHES if (value := getattr(tuning, key)) != getattr(plain, key)}
    return "".join(
        f" {_FLAG_OF[key]} {value}" if key in _FLAG_OF else f" --set {key}={value}" for key, value in changed.items()
    )


def _at(split: Split, words: str) -> tuple[str, ...]:
    return (*_refusal(split.fits), f"{split.program} {words}")


def _refusal(found: object) -> tuple[str, ...]:
    return () if found else ("# no number of these GPUs was found that holds the next command: see ee-tuning plan",)


def _tensor_parallel(size: int | None) -> str:
    return f" --tensor-parallel-size {size}" if size and size > 1 else ""
