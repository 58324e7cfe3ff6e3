"""Makes modules that several test folders share importable."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Sums in one order, whatever the machine."""
    import torch

    torch.set_num_threads(1)
