"""On a CUDA device: the kernel that computes each document by itself says what the masked one says."""

import json

from test_main_path import pytestmark as needs_gpu
from test_main_path import run

pytestmark = needs_gpu

ATTEND = """
import json
import torch
from types import SimpleNamespace
from ee_tuning.model import attention
from ee_tuning.model.documents import PackedDocuments

torch.manual_seed(0)
core = SimpleNamespace(scale=0.125)
ids = torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor([50, 1, 70, 135])), torch.zeros(256, dtype=torch.int64)])
documents = PackedDocuments.of(ids, None, torch.device("cuda"))
q, k, v = (torch.randn(256, 2, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
assert attention._has_varlen(q)
fast = attention.CausalAttention.forward(core, q, k, v, documents)
attention._has_varlen = lambda query: False
masked = attention.CausalAttention.forward(core, q, k, v, documents)
print(json.dumps({"shape": list(fast.shape), "apart": (fast - masked).abs().max().item(), "size": masked.abs().max().item()}))
"""


def test_the_kernel_for_documents_equals_the_mask() -> None:
    """Documents shifted by one between the kernel's bounds and the mask, or rows joined."""
    found = json.loads(run(ATTEND, on_gpu=True))
    assert found["shape"] == [256, 2, 512] and found["apart"] <= 0.02 * found["size"]
