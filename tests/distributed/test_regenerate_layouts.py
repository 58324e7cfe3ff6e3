"""Answers to a file of chats and to own prompts are the same at every layout, and one rank reads and writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import VOCABULARY, write_byte_tokenizer
from random_models import random_llama

from ee_tuning.config import load_config
from ee_tuning.errors import InputError
from ee_tuning.generation import regenerate as module
from ee_tuning.generation.regenerate import Wish, regenerate

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LINES: list[dict[str, Any]] = [
    {
        "id": 1,
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "b"},
        ],
    },
    {"id": 2, "prompt": "once"},
    {"id": 3, "messages": [{"role": "user", "content": "w" * 300}]},
    {"id": 4, "messages": [{"role": "user", "content": "c"}]},
]


def regenerate_at(folder: str, output: str, keys: dict[str, Any]) -> str:
    """What the command ends with: nothing, or its error."""
    module.destroy_parallel = lambda: None  # type: ignore[assignment]  # the world goes on
    prompts = Path(folder) / "prompts.jsonl"
    config = load_config(
        None,
        {
            "model.path": folder,
            "model.dtype": "float64",
            "data.paths": [str(prompts)],
            "generation.max_new_tokens": 9,
            "generation.temperature": 0.8,
            "generation.n": 2,
            **keys,
        },
    )
    try:
        regenerate(config, Wish(output=Path(output), num_own=4))
    except InputError as error:
        return str(error)
    return ""


def test_layouts_answer_the_same(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ranks that render, draw or stop otherwise and wait for ever; a file that four ranks write; prompts left out by
    one rank alone.
    """
    monkeypatch.setattr(module, "destroy_parallel", module.destroy_parallel)
    random_llama(tmp_path, vocab_size=VOCABULARY + 2, eos_token_id=256, bos_token_id=256)
    write_byte_tokenizer(tmp_path, "<|im_start|>", "<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    outputs = tmp_path.with_name(f"{tmp_path.name}_outputs")  # apart from the model, as all outputs have to be
    outputs.mkdir()
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    assert regenerate_at(str(tmp_path), str(outputs / "one.jsonl"), {}) == ""
    keys = {"parallel.tensor_model_parallel_size": 2, "parallel.pipeline_model_parallel_size": 2}
    assert world.run(regenerate_at, str(tmp_path), str(outputs / "four.jsonl"), keys) == [""] * 4
    one = (outputs / "one.jsonl").read_bytes()
    assert one == (outputs / "four.jsonl").read_bytes()
    records = [json.loads(line) for line in one.splitlines()]
    own = [record for record in records if "id" not in record]
    assert own and len({record["messages"][0]["content"] for record in own}) == len(own) // 2, "two answers to each"
    assert [record["id"] for record in records if "id" in record] == [1, 1, 2, 2, 4, 4]
    assert world.run(regenerate_at, str(tmp_path), str(outputs / "replicas.jsonl"), {}) == [""] * 4
    assert one == (outputs / "replicas.jsonl").read_bytes()
