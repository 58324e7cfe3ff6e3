"""A task of long texts: documentation strings of Python's standard library, to be continued.

    python benchmarks/documentation_task.py --output runs/docs
    ee-tuning convert --model FOLDER --exit-layers 22,26 --architecture norm --output-vocab 2048 --init fitted \
        --data runs/docs/train.jsonl --seq-length 256 --output runs/docs/exits
    ee-tuning evaluate --model FOLDER --exits runs/docs/exits --task runs/docs/task.jsonl --metric rouge-l --limit 200 \
        --thresholds 0.7 0.5 --speculative --max-new-tokens 40 --output runs/docs/evaluation

Every fifth string is held out; those of at least 350 characters are prompts of 200 characters, with the rest, up to 400
characters, as the answer.
"""

import argparse
import json
from pathlib import Path

from ee_tuning.data.sample_corpus import documentation_strings, sample_corpus

PROMPT, ANSWER, SHORTEST = 200, 400, 350
"""Numbers of characters."""


def main() -> None:
    """Writes train.jsonl, held_out.jsonl and task.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    strings = [text for files in sample_corpus() for text in documentation_strings(files)]
    held_out = [text for number, text in enumerate(strings) if number % 5 == 4]
    train = [text for number, text in enumerate(strings) if number % 5 != 4]
    tasks = [task(text.strip()) for text in held_out if len(text.strip()) >= SHORTEST]
    for name, records in (
        ("train", [{"text": text} for text in train]),
        ("held_out", [{"text": text} for text in held_out]),
        ("task", tasks),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
        print(f"wrote {folder / name}.jsonl: {len(records)} records")


def task(text: str) -> dict[str, str]:
    """Returns a task: the beginning of a text, cut between words, and its continuation."""
    cut = text.rfind(" ", 0, PROMPT)
    return {"prompt": text[:cut], "answer": text[cut:][:ANSWER]}


if __name__ == "__main__":
    main()
