"""README.md of an exit that was exported as a plain model: a description, and commands for engines."""

from collections.abc import Mapping, Sequence
from typing import Any

from ee_tuning.artifact.eagle3_engines import READ
from ee_tuning.artifact.tried_engines import tried_text
from ee_tuning.checkpoint.model_card import (
    TRANSFORMERS_LINES,
    architecture_text,
    engine_model,
    exit_origin,
    front_matter,
)
from ee_tuning.export.plain_exit import PlainExit
from ee_tuning.json_file import to_json

NUM_DRAFTS = 4
"""Draft tokens per round in the commands."""


def draft_card(
    name: str,
    plain: PlainExit,
    exits: Mapping[str, Any],
    num_layers: int,
    *,
    is_nearly: bool = False,
    merging: str = "",
) -> str:
    """Returns the card of a draft for the model `name` of `num_layers` layers; `exits` is the content of
    `exit_config.json`, `merging` is `ExportSource.merging`.
    """
    name = " ".join(name.split())
    layer, (word, what) = plain.head.layer, engine_model(name, merging)
    return _joined(
        front_matter(name, "transformers", "speculative-decoding"),
        [f"# A draft model for {name}: its exit after layer {layer}", ""],
        _what_it_is(name, plain, num_layers, is_nearly),
        _history(layer, exits),
        [
            f"It drafts for {name} with the same tokenizer and vocabulary; what is said in the end is what {name} says. "
            f"{what}; `THIS_FOLDER` is this one.",
            "",
        ],
        _commands(word, plain.config.family),
    )


def pruned_card(
    name: str, plain: PlainExit, exits: Mapping[str, Any], num_layers: int, *, is_nearly: bool = False
) -> str:
    """Returns the card of the same folder as a model in its own right."""
    name = " ".join(name.split())
    layer, family = plain.head.layer, plain.config.family
    return _joined(
        front_matter(name, "transformers", "pruned"),
        [f"# {name}, cut off after layer {layer}", ""],
        _what_it_is(name, plain, num_layers, is_nearly),
        _history(layer, exits),
        [
            f"A model in its own right: smaller and faster than {name}, and weaker. Nothing but its last norm, output "
            "matrix and what is named above was tuned for the cut; measure it before you rely on it (`ee-tuning evaluate`).",
            "",
            *TRANSFORMERS_LINES,
            "",
            tried_text("transformers", family),
            "",
            "```bash",
            "vllm serve THIS_FOLDER",
            "python -m sglang.launch_server --model-path THIS_FOLDER",
            "```",
            "",
            f"{tried_text('vLLM', family)} SGLang was not tried.",
            "",
        ],
    )


def _what_it_is(name: str, plain: PlainExit, num_layers: int, is_nearly: bool) -> list[str]:
    head, shape = plain.head, plain.config
    made = {
        "mlp": f"the first {head.layer} layers, with the exit's MLP in the last of them",
        "layer": f"the first {head.layer} layers and, above them, the exit's own",
    }.get(head.architecture, f"the first {head.layer} layers")
    output = "the exit's output matrix" if not head.ties_output else f"the output matrix of {name}"
    if head.has_linear:
        output += ", into which the exit's linear map is folded"
    return [
        f"A plain `{shape.family}` of {shape.num_layers} layers, made of the {num_layers} of {name} and its "
        f"{architecture_text(head.architecture)} exit after layer {head.layer}: {made}, the exit's norm, {output}. Its logits "
        + (
            "are nearly the exit's, for the map's bias has no place of its own here. "
            if is_nearly
            else "are the exit's. "
        )
        + "It needs no code but the engine's.",
        "",
    ]


def _history(layer: int, exits: Mapping[str, Any]) -> list[str]:
    return [exit_origin(layer, exits), ""]


def _commands(model: str, family: str) -> list[str]:
    return [
        *_vllm(model, family),
        *_transformers(model, family),
        *_sglang(model),
        *_tensorrt_llm(model),
        *_llama_cpp(model, family),
    ]


def _vllm(model: str, family: str) -> list[str]:
    config = to_json({"method": "draft_model", "model": "THIS_FOLDER", "num_speculative_tokens": NUM_DRAFTS})
    return [
        "## vLLM",
        "",
        "```bash",
        f"vllm serve {model} --speculative-config '{config}'",
        "```",
        "",
        f'With `--tensor-parallel-size N` add `"draft_tensor_parallel_size": N`. {tried_text("vLLM", family)}',
        "",
    ]


def _transformers(model: str, family: str) -> list[str]:
    return [
        "## transformers",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{model}", trust_remote_code=False)',
        'draft = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=False)',
        "model.generate(**inputs, assistant_model=draft, do_sample=False)",
        "```",
        "",
        tried_text("transformers", family),
        "",
    ]


def _sglang(model: str) -> list[str]:
    return [
        "## SGLang",
        "",
        "```bash",
        f"python -m sglang.launch_server --model-path {model} --speculative-algorithm STANDALONE \\",
        "  --speculative-draft-model-path THIS_FOLDER \\",
        f"  --speculative-num-steps {NUM_DRAFTS - 1} --speculative-eagle-topk 1 --speculative-num-draft-tokens {NUM_DRAFTS}",
        "```",
        "",
        f"{NUM_DRAFTS - 1} drafts a round: SGLang counts the token before them, too. Not tried; the flags were read in the source of {READ['SGLang']}.",
        "",
    ]


def _tensorrt_llm(model: str) -> list[str]:
    return [
        "## TensorRT-LLM",
        "",
        "```bash",
        "cat > draft.yaml <<END",
        "disable_overlap_scheduler: true",
        "speculative_config:",
        "  decoding_type: Draft_Target",
        f"  max_draft_len: {NUM_DRAFTS}",
        "  speculative_model: THIS_FOLDER",
        "END",
        f"trtllm-serve {model} --config draft.yaml",
        "```",
        "",
        "Not tried; the keys were read in the source at commit 0004396, which takes `Draft_Target` and not the `DraftTarget` of its "
        "documentation. `--extra_llm_api_options` is another name of `--config`.",
        "",
    ]


def _llama_cpp(model: str, family: str) -> list[str]:
    return [
        "## llama.cpp",
        "",
        "```bash",
        f"python convert_hf_to_gguf.py {model} --outfile model.gguf",
        "python convert_hf_to_gguf.py THIS_FOLDER --outfile draft.gguf",
        f"llama-server -m model.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {NUM_DRAFTS}",
        "```",
        "",
        f"{tried_text('llama.cpp', family)} Both files in one type (`--outtype f32`, or quantized alike), or few drafts are accepted. "
        "`llama-speculative-simple` takes the same flags and counts accepted drafts.",
        "",
    ]


def _joined(*parts: Sequence[str]) -> str:
    return "\n".join(line for part in parts for line in part)
