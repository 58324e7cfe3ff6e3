"""README.md of outputs: a short model card as model hubs show it. Pure functions of the folder's config."""

from collections.abc import Mapping, Sequence
from typing import Any

from ee_tuning.json_file import to_json

MODEL_FOLDER = "MODEL_FOLDER"
"""Stands in commands for the folder of a model whose name is no word of a command."""
TRANSFORMERS_LINES = (
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=False)',
    'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", trust_remote_code=False)',
    "```",
)
"""Lines of a plain folder's card: loading it with transformers."""


def artifact_card(exits: Mapping[str, Any]) -> str:
    """Returns the card of an exit-heads artifact, from its `exit_config.json`."""
    name = " ".join(str(exits["model_name"]).split())
    layers = list(exits["exit_layers"])
    return "\n".join(
        [
            *front_matter(name, "ee_tuning"),
            f"# Exit heads for {name}",
            "",
            f"{architecture_text(exits['architecture'])} heads after layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}, "
            f"output matrix {exits['output']}{vocab_text(exits.get('output_vocab'))}, {exits['dtype']}. They let the "
            "model stop at one of "
            "these layers where it is sure of the next token; the model itself is unchanged and not in this folder.",
            "",
            *_history(exits),
            "",
            "```bash",
            f'ee-tuning generate --model {shell_word(name)} --exits THIS_FOLDER --threshold 0.8 --prompt "Once upon a time"',
            "```",
            "",
            f"Bound to the model with fingerprint `{exits['model_fingerprint']}`. `ee-tuning verify` checks the files.",
            "",
        ]
    )


def trained_card(name: str, facts: Mapping[str, Any]) -> str:
    """Returns the card of weights that `tune` trained for a model. `facts` are those of the run."""
    name = " ".join(name.split())
    return "\n".join(
        [
            *front_matter(name, "peft" if facts["trainable"] == "lora" else "ee_tuning"),
            f"# Weights trained for {name}",
            "",
            f"`{facts['trainable']}`, {facts['steps']:,} steps, {facts['tokens']:,} tokens. They go with the model with "
            f"fingerprint `{facts['model_fingerprint']}`.",
            "",
            "```bash",
            f"ee-tuning export --format hf --model {shell_word(name)} --adapter THIS_FOLDER --output MERGED",
            "```",
            "",
        ]
    )


def export_card(name: str, exits: Mapping[str, Any] | None, adapter: str | None = None) -> str:
    """Returns the card of a merged Hugging Face folder, or of a plain one without exits. `adapter` names the folder of
    the trained weights that it has.
    """
    name = " ".join(name.split())
    own = "as it was" if adapter is None else f"with the trained weights of `{' '.join(adapter.split())}`"
    if exits is None:
        content = "The model's own files, tensor for tensor." if adapter is None else f"{name} {own}."
        return "\n".join([*front_matter(name, "transformers"), f"# {name}", "", content, ""])
    return "\n".join(
        [
            *front_matter(name, "transformers"),
            f"# {name}, with early exits",
            "",
            f"`model*.safetensors` is {name} {own}; `exit_heads*.safetensors` holds {architecture_text(exits['architecture'])} exit "
            f"heads after layers {', '.join(map(str, exits['exit_layers']))}.",
            "",
            *_history(exits),
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "",
            "plain = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=False)",
            "early = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
            "early.generate(**inputs, exit_threshold=0.8)  # a token leaves at the first exit this confident; omit it for the plain model",
            "```",
            "",
            "`modeling_early_exit.py` needs only torch, transformers and safetensors.",
            "",
        ]
    )


def architecture_text(words: str | Sequence[str]) -> str:
    """Returns `mlp` where all exits have it, or `norm`, `mlp` in the order of the exits."""
    each = [words] if isinstance(words, str) else list(words)
    return ", ".join(f"`{word}`" for word in (each if len(set(each)) > 1 else each[:1]))


def init_text(init: str, seed: int | None) -> str:
    """Returns how the exits were initialized."""
    return {
        "copy": "copied from the model",
        "random": f"drawn at random, seed {seed}",
        "ee_llm": "as EE-LLM tuned them",
        "fitted": "fitted to the final state by least squares",
        "published": "as it was published",
    }[init]


def vocab_text(listed: Mapping[str, Any] | None, *, drafts: bool = False) -> str:
    """Returns the vocabulary of exits, or of a drafting head, as an addition to their output matrix."""
    if listed is None:
        return ""
    share = f" ({listed['share']:.1%} of a text)" if listed["tokens"] else ""
    added = f", {listed['size'] - listed['widened_from']:,} of them added later" if "widened_from" in listed else ""
    other = "" if drafts else f"{',' if added else ''} and any other"
    return f", for {listed['size']:,} tokens of the vocabulary{share}{added}{other}"


def front_matter(name: str, library: str, *tags: str) -> list[str]:
    """Returns the lines for hubs: the library that loads the folder, the model from which it was made, and tags."""
    return [
        "---",
        f"library_name: {library}",
        f"base_model: {to_json(name)}",
        f"tags: [{', '.join(('early-exit', 'ee-tuning', *tags))}]",
        "---",
        "",
    ]


def shell_word(name: str, otherwise: str = MODEL_FOLDER) -> str:
    """Returns a model's name as a word of a command."""
    return name if all(c.isalnum() or c in "-_./" for c in name) else otherwise


def engine_model(name: str, merging: str) -> tuple[str, str]:
    """Returns the word for the model in commands for engines, and what it is: the folder of `name`, or the one that the
    command `merging` writes.
    """
    if not merging:
        word = shell_word(name)
        return word, f"`{word}` below is the folder of {name}"
    return MODEL_FOLDER, f"`{MODEL_FOLDER}` below is {name} as engines load it: `{merging}`"


def exit_origin(layer: int, exits: Mapping[str, Any]) -> str:
    """Returns how one exit was initialized and tuned, from the content of `exit_config.json`."""
    origin = (exits.get("origins") or {}).get(str(layer))
    return origin_text(exits if origin is None else {**origin, "tuned": exits["tuned"] or origin["tuned"]})


def _history(exits: Mapping[str, Any]) -> list[str]:
    """Returns how the exits were initialized and tuned, in one line if it is the same for all."""
    origins = exits.get("origins")
    if origins is None:
        return [origin_text(exits)]
    return [f"- layer {layer}: {exit_origin(int(layer), exits)}" for layer in origins]


def origin_text(origin: Mapping[str, Any]) -> str:
    """Returns how exits with these keys of `exit_config.json` were initialized and tuned."""
    began, tuned = init_text(origin["init"], origin["seed"]), origin["tuned"]
    if tuned is None:
        return f"Initialization: {began}; not tuned."
    return f"Initialization: {began}; tuned: " + ", ".join(f"{key} {value}" for key, value in tuned.items()) + "."
