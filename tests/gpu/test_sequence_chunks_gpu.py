"""On a CUDA device: the kernel that attends over earlier chunks says what the masked one says."""

import json

from test_main_path import pytestmark as needs_gpu
from test_main_path import run

pytestmark = needs_gpu

ATTEND = """
import json
import torch
from types import SimpleNamespace
from ee_tuning.model import attention
from ee_tuning.model.sequence_chunk import KeyValueCache, SequenceChunk

torch.manual_seed(0)
ids = torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor([50, 1, 70, 135])), torch.zeros(256, dtype=torch.int64)])
q, k, v = (torch.randn(256, 2, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
core = SimpleNamespace(scale=0.125, layer_number=1)

def attend(known):
    cache, parts = KeyValueCache(), []
    for start in range(0, 256, 64):
        chunk = SequenceChunk.between(start, start + 64, known, None, shape=(2, 256), cache=cache, device=q.device)
        part = slice(start, start + 64)
        parts.append(attention.CausalAttention.forward(core, q[part], k[part], v[part], chunk))
    return torch.cat(parts)

assert attention._has_varlen(q, "seqused_k")
fast = [attend(known) for known in (ids, None)]
attention._has_varlen = lambda query, parameter=None: False
masked = [attend(known) for known in (ids, None)]
print(json.dumps([[(a - b).abs().max().item(), b.abs().max().item()] for a, b in zip(fast, masked)]))
"""


def test_the_kernel_over_earlier_chunks_equals_the_mask() -> None:
    """Causality that the kernel counts from the first key and not from the last, keys of another row."""
    for apart, size in json.loads(run(ATTEND, on_gpu=True)):
        assert apart <= 0.02 * size
