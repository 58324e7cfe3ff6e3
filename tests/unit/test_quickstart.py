"""examples/quickstart.ipynb runs, cell by cell."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ee_tuning.parallel.topology import destroy_parallel

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs() -> None:
    """A notebook that stops at a renamed flag is worse than none: it is the first thing that many try."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    if dist.is_initialized():  # left by another test
        destroy_parallel()
    try:
        for number, cell in enumerate(cells, 1):
            exec(compile(cell, f"cell {number}", "exec"), names)
    finally:
        destroy_parallel()
    completions = names["completions"]
    assert completions["calibrated"].mean_depth < names["llm"].num_layers == completions["full"].mean_depth
    assert completions["speculative"].text == completions["full"].text
