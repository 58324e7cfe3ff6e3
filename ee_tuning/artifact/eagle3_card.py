"""README.md of an EAGLE-3 drafting head: of its artifact, and of its exports for engines."""

from collections.abc import Mapping
from typing import Any

from ee_tuning.artifact.eagle3_engines import READ, eagle3_engines
from ee_tuning.artifact.tried_engines import tried_text
from ee_tuning.checkpoint.model_card import engine_model, origin_text, shell_word, vocab_text
from ee_tuning.json_file import to_json

_SGLANG = f"SGLang {READ['SGLang']}"
_READERS = "writes it as vLLM and SGLang load it, `--format speculators` as `vllm serve FOLDER` does."


def eagle3_artifact_card(exits: Mapping[str, Any]) -> str:
    """Returns the card of an artifact, from its `exit_config.json`."""
    name = " ".join(str(exits["model_name"]).split())
    given = f"--model {shell_word(name)} --exits THIS_FOLDER"
    exported = [f"ee-tuning export --format eagle3 {given} --output FOLDER", "```", "", _READERS]
    own = [f'ee-tuning generate {given} --policy speculative --prompt "…"', "```", "", "drafts with it."]
    return "\n".join(
        [
            *_beginning(name, exits),
            "```bash",
            *(exported if eagle3_engines(exits["model_shape"]["family"]) else own),
            "",
            f"Bound to the model with fingerprint `{exits['model_fingerprint']}`. `ee-tuning verify` checks the files.",
            "",
        ]
    )


def eagle3_card(name: str, exits: Mapping[str, Any], layout: str, num_steps: int, merging: str = "") -> str:
    """Returns the card of an export in `layout`, with commands for engines that draft `num_steps` tokens. `merging` is
    `ExportSource.merging`.
    """
    name = " ".join(name.split())
    (word, what), family = engine_model(name, merging), exits["model_shape"]["family"]
    vllm = to_json({"method": "eagle3", "model": "THIS_FOLDER", "num_speculative_tokens": num_steps})
    own = [
        "```bash",
        "vllm serve THIS_FOLDER",
        "```",
        "",
        "The model's path or name is in config.json (`verifier`).",
    ]
    commands = [
        f"{what}; `THIS_FOLDER` is this one.",
        "",
        "```bash",
        f"vllm serve {word} --speculative-config '{vllm}'",
        "```",
        "",
        *([] if layout == "eagle3" else [*own, ""]),
        tried_text("vLLM", family),
        "",
        *(_sglang(word, exits, num_steps) if layout == "eagle3" else []),
        *_llama_cpp(word, exits, num_steps),
    ]
    return "\n".join([*_beginning(name, exits), *commands])


def _sglang(word: str, exits: Mapping[str, Any], num_steps: int) -> list[str]:
    """Returns the command for SGLang, or the reason why it does not run this head."""
    family, draft = exits["model_shape"]["family"], exits["draft"]
    if "SGLang" not in eagle3_engines(family):
        return [f"{_SGLANG} does not run this head: it has no drafting layer for a `{family}`.", ""]
    if draft.get("norm_before_residual"):
        return [f"{_SGLANG} does not compute this head: it passes over `norm_before_residual`.", ""]
    if exits["model_shape"]["num_layers"] in draft["aux_layers"]:
        return [f"{_SGLANG} does not run this head: it hands out no states behind the last layer.", ""]
    return [
        "```bash",
        f"python -m sglang.launch_server --model-path {word} --speculative-algorithm EAGLE3 \\",
        f"    --speculative-draft-model-path THIS_FOLDER --speculative-num-steps {num_steps} \\",
        f"    --speculative-eagle-topk 1 --speculative-num-draft-tokens {num_steps + 1}",
        "```",
        "",
        f"Not tried; the flags were read in the source of {_SGLANG}.",
        "",
    ]


def _llama_cpp(word: str, exits: Mapping[str, Any], num_steps: int) -> list[str]:
    """Returns commands for llama.cpp, whose converter passes over the norms fc_norm and norm_output, or the reason."""
    if exits["draft"].get("fc_norm") or exits["draft"].get("norm_output"):
        return ["llama.cpp does not compute this head: its converter passes over `fc_norm` and `norm_output`.", ""]
    return [
        "```bash",
        f"python convert_hf_to_gguf.py {word} --outfile model.gguf",
        f"python convert_hf_to_gguf.py THIS_FOLDER --target-model-dir {word} --outfile draft.gguf",
        f"llama-server -m model.gguf -md draft.gguf --spec-type draft-eagle3 --spec-draft-n-max {num_steps}",
        "```",
        "",
        tried_text("llama.cpp", exits["model_shape"]["family"]),
        "",
    ]


def _beginning(name: str, exits: Mapping[str, Any]) -> list[str]:
    vocabulary = vocab_text(exits.get("output_vocab"), drafts=True)
    return [
        "---",
        "library_name: ee_tuning",
        f"base_model: {to_json(name)}",
        "tags: [eagle3, speculative-decoding, ee-tuning]",
        "---",
        "",
        f"# An EAGLE-3 head for {name}",
        "",
        f"It drafts tokens from the states after layers {', '.join(map(str, exits['draft']['aux_layers']))} of the model, which checks them "
        f"(arXiv 2503.01840); {exits['dtype']}{vocabulary}. The model itself is unchanged and not in this folder.",
        "",
        origin_text(exits),
        "",
    ]
