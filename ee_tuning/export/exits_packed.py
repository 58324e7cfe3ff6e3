"""Files of the exits in a merged Hugging Face folder: the artifact's own bytes, or new files where a `layer` head has
experts.

transformers 5 holds a layer's experts in two tensors, and so must the file; otherwise the modelling file would need the
expert names of every family.
"""

import re

from ee_tuning.artifact.exit_heads import STEM, ExitHeadsReader
from ee_tuning.checkpoint.hf_names import HF_NAMES
from ee_tuning.checkpoint.huggingface_files import FileToWrite, copied_file, joined_files
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.storage.safetensors_layout import SafetensorsLayout
from ee_tuning.storage.tensor_slice import TensorShape

_LAYER = re.compile(r"(exits\.\d+\.layer\.)(.+)\.weight")


def exit_files(artifact: ExitHeadsReader, config: ModelConfig) -> list[FileToWrite]:
    """Returns the files to write beside the model."""
    parts = _parts(artifact, config)
    if all(own == [name] for name, own in parts.items()):
        return [copied_file(artifact, name) for name in sorted(artifact.weight_files())]
    shapes = {name: _shape(artifact, name, own, config.num_experts) for name, own in parts.items()}
    layout = SafetensorsLayout(STEM, shapes, {name: artifact.dtype(own[0]) for name, own in parts.items()})
    return joined_files(artifact, layout, parts)


def _parts(artifact: ExitHeadsReader, config: ModelConfig) -> dict[str, list[str]]:
    """Returns, per tensor of the exported file, the artifact's tensors that it holds, in order."""
    hf_names = HF_NAMES[config.family]
    places = {hf_names.router: "mlp.gate.weight"}
    for expert in range(config.num_experts or 0):
        places |= {
            hf_names.expert_gate.format(expert): "mlp.experts.gate_up_proj",
            hf_names.expert_up.format(expert): "mlp.experts.gate_up_proj",
            hf_names.expert_down.format(expert): "mlp.experts.down_proj",
        }
    order = list(places)

    def place(name: str) -> tuple[str, int]:
        match = _LAYER.fullmatch(name)
        return (match[1] + places[match[2]], order.index(match[2])) if match and match[2] in places else (name, 0)

    parts: dict[str, list[str]] = {}
    for name in sorted(artifact.names(), key=lambda name: place(name)[1]):
        parts.setdefault(place(name)[0], []).append(name)
    return parts


def _shape(artifact: ExitHeadsReader, name: str, own: list[str], num_experts: int) -> TensorShape:
    rows, *width = artifact.shape(own[0])
    return (rows, *width) if name in own or len(own) == 1 else (num_experts, len(own) // num_experts * rows, *width)
