"""Packed experts: transformers 5 holds all experts of a layer in two 3-dimensional tensors, and can save them so.

This file presents them as tensors of single experts, which is how families name them and how transformers saves them by
default.
"""

import json
import re
from dataclasses import dataclass

from ee_tuning.checkpoint.hf_names import HF_NAMES, HFNames
from ee_tuning.errors import InputError
from ee_tuning.storage.safetensors_file import TensorRange
from ee_tuning.storage.safetensors_reader import SafetensorsFolder
from ee_tuning.storage.tensor_slice import TensorShape

_PACK = re.compile(r"(?:model\.)?(layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(?:model\.)?(layers\.\d+\.)mlp\.gate\.weight")
"""The router's name, which identifies each family in this form."""


@dataclass(frozen=True)
class Slab:
    """The matrix of one expert: rows `first_row`… of entry `expert` of the tensor `stored`."""

    stored: str
    expert: int
    first_row: int
    shape: TensorShape

    def within(self, part: TensorRange) -> TensorRange:
        """Translates a range of this matrix to a range of `stored`."""
        rows, columns = (*part, *(slice(None),) * (2 - len(part)))
        start, stop, _ = rows.indices(self.shape[0])
        return slice(self.expert, self.expert + 1), slice(self.first_row + start, self.first_row + stop), columns


def expert_slabs(folder: SafetensorsFolder) -> dict[str, Slab]:
    """Returns the slabs of all packed experts, none where experts are stored singly.

    Raises InputError where an expert is stored twice.
    """
    packs = {name: match for name in folder.files if (match := _PACK.fullmatch(name))}
    hf_names = _hf_names(folder) if packs else HFNames()
    slabs: dict[str, Slab] = {}
    for name, match in packs.items():
        shape = folder.shape(name)
        if len(shape) != 3 or (match[2] == "gate_up_proj" and shape[1] % 2):
            raise InputError(
                f"{folder.folder / folder.files[name]}: tensor {name} must hold matrices of experts, got shape {list(shape)}; "
                "fetch it again"
            )
        stems = (hf_names.expert_gate, hf_names.expert_up) if match[2] == "gate_up_proj" else (hf_names.expert_down,)
        size = shape[1] // len(stems)
        for expert in range(shape[0]):
            for half, stem in enumerate(stems):
                slabs[f"model.{match[1]}{stem.format(expert)}.weight"] = Slab(
                    name, expert, half * size, (size, shape[2])
                )
    for name in slabs.keys() & folder.files.keys():
        raise InputError(
            f"{folder.folder} holds tensor {name} twice, alone and in {slabs[name].stored}; fetch the folder again"
        )
    return slabs


def router_names(folder: SafetensorsFolder) -> dict[str, str]:
    """Maps the router names of families that have their own to the names used beside packed experts."""
    own = _hf_names(folder).router
    return {
        f"model.{match[1]}{own}.weight": name
        for name in folder.files
        if own != "mlp.gate" and (match := _ROUTER.fullmatch(name))
    }


def _hf_names(folder: SafetensorsFolder) -> HFNames:
    path = folder.folder / "config.json"
    try:
        return HF_NAMES[json.loads(path.read_text(encoding="utf-8"))["model_type"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} must tell the model_type of the experts beside it: {error!r}; fetch the model's own config.json"
        ) from error
