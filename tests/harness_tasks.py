"""Tasks for lm-evaluation-harness that need no network: YAML and data in a folder, beside a model of bytes."""

import json
from pathlib import Path

from byte_tokenizer import write_byte_tokenizer
from exits import write_exits
from random_models import random_llama

WORDS = (
    "the quick brown fox",
    "jumps over",
    "a lazy dog",
    "and runs away",
    "into the wood",
    "where no path",
    "has ever been",
    "before noon",
)


def write_subject(folder: Path, num_documents: int = 6) -> Path:
    """A random model of bytes in model/, its exits in exits/ and the tasks in tasks/ of `folder`."""
    bytes_and_end = {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": 256}
    random_llama(folder / "model", **bytes_and_end, max_position_embeddings=96, confident=True)
    write_byte_tokenizer(folder / "model")
    write_exits(folder / "model", folder / "exits")
    write_tasks(folder / "tasks", num_documents)
    return folder


def write_tasks(folder: Path, num_documents: int = 6) -> Path:
    """`ours_choice` (with few-shot examples of its own), `ours_text` (until a line's end) and `ours_rolling`, in
    `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        {
            "question": f"{WORDS[i % 8]} {i} ",
            "choices": [WORDS[(i + j) % 8] for j in (1, 2, 5)],
            "answer": i % 3,
            "text": " ".join(WORDS[(i + j) % 8] for j in range(i % 5 + 1)),
        }
        for i in range(num_documents)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    data = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "documents.jsonl"}
test_split: test
fewshot_split: test
metadata:
  version: 1.0
"""
    (folder / "choice.yaml").write_text(
        f"""task: ours_choice
{data}output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
""",
        encoding="utf-8",
    )
    (folder / "text.yaml").write_text(
        f"""task: ours_text
{data}output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
        encoding="utf-8",
    )
    (folder / "rolling.yaml").write_text(
        f"""task: ours_rolling
{data}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
        encoding="utf-8",
    )
    return folder
