"""Folders that this project wrote, known by their files: runs, exit-heads artifacts, and what is on the way to them."""
import re
from pathlib import Path

_MARKS = (("exit_config.json",), ("config.yaml", "metrics.jsonl"), ("config.yaml", "checkpoints"))
"""Names that stand together in a folder of ours."""


def is_ours(folder: Path) -> bool:
    """Whether `folder` is a run, an artifact, or one of them half-written."""
    is_partial = re.search(r"\.(partial|replaced)-[0-9a-f]{8}$", folder.name) is not None
    return is_partial or any(all((folder / name).exists() for name in names) for names in _MARKS)
