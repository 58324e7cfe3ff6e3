"""What Megatron-LM's parser leaves in a Namespace besides the model's shape, kind by kind as its own list of safe names
has them.
"""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def other_arguments() -> dict[str, Any]:
    """By Megatron-LM's names, with its defaults where it has some; all of it is data that no reader of weights looks
    at.
    """
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.rerun_state_machine import RerunDiagnostic, RerunMode, RerunState
    from megatron.core.transformer.enums import AttnBackend, CudaGraphScope

    return {
        "attention_backend": AttnBackend.auto,
        "cuda_graph_scope": [CudaGraphScope.attn],
        "model_type": ModelType.encoder_or_decoder,
        "exit_signal": signal.SIGTERM,
        "exit_signal_handler": False,
        "data_path": ["corpus"],
        "save": Path("runs") / "a",
        "load": None,
        "main_grads_dtype": torch.float32,
        "fp8_dtype": torch.float8_e4m3fn,
        "device": torch.device("cpu"),
        "tags": {"a", "b"},
        "optimizer": OptimizerConfig(lr=1e-4),
        "rerun": [RerunMode.DISABLED, RerunState.NOT_RUNNING_YET, RerunDiagnostic.CORRECT_RESULT],
        "dataset": SimpleNamespace(split="99,1,0"),
        "seed_state": torch.Generator(),
    }
