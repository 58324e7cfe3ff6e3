"""What two run folders have in common."""

import json
from pathlib import Path

OF_THE_MACHINE = {"tokens_per_second", "flops_per_second", "idle_share", "memory_bytes"}
"""Keys of records that differ from run to run."""


def same_heads_and_records(got: Path, wanted: Path) -> None:
    """Raises AssertionError where two run folders hold other exit heads, or other records of their steps."""
    for path in sorted((wanted / "exit_heads").glob("*.safetensors")):
        assert (got / "exit_heads" / path.name).read_bytes() == path.read_bytes(), path.name
    kept = []
    for run in (got, wanted):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
        kept.append([{key: value for key, value in each.items() if key not in OF_THE_MACHINE} for each in records])
    assert kept[0] == kept[1]
