"""What a machine without CUDA gets done to its torch must not be felt by other libraries."""
import subprocess
import sys

CHECK = """
import torch
from ee_tuning.parallel.device import prepare_device
prepare_device()
with torch.device("meta"):
    made = [torch.empty(2), torch.zeros(2), torch.tensor([1.0])]
print(*{tensor.device.type for tensor in made})
"""


def test_device_contexts_still_reach_the_adapted_factories():
    """transformers builds models in such a context; one loaded after our own had rotary frequencies of uninitialized memory."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["meta"]
