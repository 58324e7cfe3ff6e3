"""Error messages for missing weights: the files that are there instead, and the remedy."""

import re
from pathlib import Path

from ee_tuning.errors import InputError
from ee_tuning.foreign_content import describe_content
from ee_tuning.storage.links import dangling_link

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_OTHERS = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.ckpt", "*.npz", "*.safetensors")
"""File patterns of weights in other formats."""
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state")
_SAVE_ANEW = (
    "load it by transformers and save it again (AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)), which "
    "writes safetensors"
)


def other_weights(folder: Path) -> list[str]:
    """Returns the names of files in `folder` that hold weights in an unsupported form or under an unusual name."""
    names = {path.name for pattern in _OTHERS for path in folder.glob(pattern)}
    return sorted(name for name in names if not name.startswith((*_NO_WEIGHTS, "exit_heads", "adapter", "tokenizer")))


def no_weights(folder: Path, stem: str) -> InputError:
    """Returns the error for a `folder` with neither `<stem>.safetensors` nor the index of its shards."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if reason := dangling_link(single) or dangling_link(index):
        return InputError(reason)
    shards = sorted(path.name for path in folder.glob(f"{stem}-*.safetensors") if _SHARD.fullmatch(path.name))
    if shards:
        return InputError(
            f"{index} is missing, and {len(shards)} shard{'s' * (len(shards) > 1)} of a model "
            f"({shards[0]}{', …' * (len(shards) > 1)}) are there: the index says which shard holds a tensor; fetch it, too"
        )
    rule = f"{folder} must hold {single.name} or {index.name}, and holds neither"
    if found := other_weights(folder):
        safetensors = [name for name in found if name.endswith(".safetensors")]
        if safetensors:
            return InputError(
                f"{rule}, but {safetensors[0]}; give the folder of the model as transformers saves it, or call the file "
                f"{single.name} where it holds all of the model under transformers' names"
            )
        if ggufs := [name for name in found if name.endswith(".gguf")]:
            return InputError(f"{folder} holds GGUF files, which are given by name: --model {folder / ggufs[0]}")
        what = describe_content(folder / found[0])
        remedy = (
            _SAVE_ANEW
            if found[0].startswith("pytorch_model")
            else "give the model as transformers saves it (safetensors)"
        )
        return InputError(
            f"{rule}, but {found[0]}, which is not read{f' (it {what})' if what and 'LFS' in what else ''}; {remedy}"
        )
    return InputError(f"{rule}; fetch the whole folder")


def refuse_file(path: Path) -> None:
    """Raises InputError where `path`, which should be a model's folder, is a file or a broken link."""
    if reason := dangling_link(path):
        raise InputError(reason)
    if path.is_file():
        if reason := describe_content(path):
            raise InputError(f"{path} {reason}")
        raise InputError(
            f"model.path must name a model's folder, and {path} is a file; give the folder of a model, with config.json and "
            f"safetensors, or that of a Megatron checkpoint{f' ({path.parent})' if path.suffix == '.safetensors' else ''}"
        )
    if path.suffix == ".gguf":
        raise InputError(f"there is no GGUF file {path}; give one that is there")
