"""Tasks for lm-evaluation-harness that need no network: YAML and data in a folder."""

import json
from pathlib import Path

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
