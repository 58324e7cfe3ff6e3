"""The process that ranks and other helpers of tests are forked from: it has imported what they need, which takes each
process of its own five seconds.

Children share its hash seed: sets of strings have one order on all ranks of a world. Ranks under torchrun have not.
"""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

_TESTS = Path(__file__).parent
_PATHS = [_TESTS.parent, _TESTS, _TESTS / "distributed", _TESTS / "stress"]
_IMPORTED = [
    "ee_tuning.cli",
    "ee_tuning.artifact.convert",
    "ee_tuning.calibration.calibrate_command",
    "ee_tuning.evaluation.evaluate_command",
    "ee_tuning.export.command",
    "ee_tuning.export.export_artifact",
    "ee_tuning.export.export_huggingface",
    "ee_tuning.export.megatron_writer",
    "ee_tuning.generation.command",
    "ee_tuning.generation.llm",
    "ee_tuning.tuning.command",
    "matplotlib.figure",
    "megatron_files",
    "mixtures",
    "safetensors_stress",
    "stages",
    "torch._dynamo",  # torch's optimizers import it, a second of each rank
    "torch.distributed.checkpoint",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "tuning_jobs",
]


def forked() -> ForkServerContext:
    """A context of multiprocessing whose processes are forked from the one warm parent of this process.

    They have the environment, but for OMP_NUM_THREADS=1, that this process had at the first call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    # Python 3.11's server reads neither this process's sys.path nor what is imported here.
    paths = os.pathsep.join([*map(str, _PATHS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}):
        forkserver.ensure_running()
    return context
