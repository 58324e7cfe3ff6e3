"""Writes a merged Hugging Face folder: the model, its exits, and one modelling file that decodes with early exits.

transformers' stock class loads the folder as the plain model; with trust_remote_code=True it loads
`modeling_early_exit.py`. A model from a Hugging Face folder keeps its files byte for byte; one in another format is
written tensor by tensor under Hugging Face's names.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ee_tuning.artifact.exit_config import exit_config_tree
from ee_tuning.checkpoint.huggingface_files import FileToWrite, backbone_files, backbone_layout, copied_file
from ee_tuning.checkpoint.model_card import export_card
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.export.companions import MODELLING, companions
from ee_tuning.export.exits_packed import exit_files
from ee_tuning.export.export_source import ExportSource, check_target, open_for_export
from ee_tuning.export.folder_writer import MARKS, copy_files, write_folder
from ee_tuning.json_file import to_json
from ee_tuning.model_config.config import ModelConfig
from ee_tuning.model_config.huggingface_config import HUGGINGFACE_CLASSES
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology

_COPIED_KEYS = (
    "exit_layers",
    "architecture",
    "adapter_rank",
    "output",
    "output_vocab",
    "init",
    "seed",
    "fitted",
    "tuned",
    "origins",
    "model_fingerprint",
)
"""Keys of exit_config.json that config.json repeats under `early_exit`."""


def export_huggingface(
    config: Config,
    output: Path,
    topology: Topology | None = None,
    *,
    links: bool = False,
    overwrite: bool = False,
    special: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Writes model.path, in any format, with the exits of exits.path, if given, to `output`.

    All ranks call it and share the files. With `links`, shards of a Hugging Face folder are linked instead of copied
    (hard links, or relative symbolic links to another disk). The tokenizer's files come from data.tokenizer or the
    model's folder; `special` holds token ids for config.json that the model's own config lacks. Raises InputError where
    model and exits do not belong together or `output` can not be written; nothing is left behind then.
    """
    tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else None
    on_first_rank(topology, lambda: check_target(config, output, overwrite, MARKS))
    with open_for_export(config, topology) as model:
        if links and model.files is None:
            raise InputError(
                f"--link links the weights of a Hugging Face folder, and {model.source.folder} is in another format, "
                "whose weights must be rewritten; leave --link out"
            )
        files, described = _files(model, links), _described_config(model, special)
        write_folder(
            model,
            files,
            output,
            topology,
            lambda partial: _complete(model, described, partial, tokenizer),
            "make room, choose another folder, or give --link",
        )


def _files(model: ExportSource, links: bool) -> list[FileToWrite]:
    if model.files is None:
        files = backbone_files(model.source, backbone_layout(model.source, model.model))
    else:
        files = [copied_file(model.files, name, is_linked=links) for name in sorted(set(model.files.files.values()))]
    if model.artifact:
        files += exit_files(model.artifact, model.model)
    return files


def _complete(model: ExportSource, described: dict[str, Any], partial: Path, tokenizer: Path | None) -> None:
    folder = model.source.folder
    copy_files(companions(model, tokenizer), partial)
    if model.files is None:
        backbone_layout(model.source, model.model).write_index(partial)
    elif not (folder / "model.safetensors").exists():
        copy_files({path.name: path for path in folder.glob("model.safetensors.index.json")}, partial)
    if model.artifact:
        shutil.copyfile(MODELLING, partial / MODELLING.name)
    (partial / "README.md").write_text(
        export_card(model.name, described.get("early_exit"), model.adapter), encoding="utf-8"
    )
    # Last, except for the manifest: an export killed before has no config.json, so nothing loads it.
    if model.files is not None and described == model.description:
        shutil.copyfile(folder / "config.json", partial / "config.json")
    else:
        (partial / "config.json").write_text(to_json(described, indent=2) + "\n", encoding="utf-8")


def _described_config(model: ExportSource, special: Mapping[str, int]) -> dict[str, Any]:
    """Returns config.json with the keys of the modelling file or, without exits, without those of an earlier export.

    Raises InputError where the model's own auto_map is malformed.
    """
    raw = {**model.described(), **{key: token for key, token in special.items() if model.description.get(key) is None}}
    classes = raw.get("auto_map") or {}
    if not isinstance(classes, dict):
        raise InputError(
            f"{model.source.folder / 'config.json'}: auto_map must be an object, got {classes!r}; fetch the model's own"
        )
    others = {key: value for key, value in classes.items() if not str(value).startswith(f"{MODELLING.stem}.")}
    plain = {
        key: value for key, value in raw.items() if key != "early_exit" and (key != "auto_map" or others == classes)
    }
    if model.artifact is None:
        return {**plain, "auto_map": others} if others else plain
    tree = exit_config_tree(model.artifact.config)
    listed = {"token_ids": list(model.artifact.config.token_ids)} if model.artifact.config.token_ids else {}
    early_exit = {**{key: tree[key] for key in _COPIED_KEYS if key in tree}, **listed}
    early_exit["files"] = [file.name for file in exit_files(model.artifact, model.model)]
    own_class = f"{MODELLING.stem}.{early_exit_class(model.model)}"
    # Users who trust the exits' code run no other model code, and need none: transformers has a class for every family.
    others = {key: value for key, value in others.items() if key == "AutoTokenizer"}
    return {**plain, "auto_map": {**others, "AutoModelForCausalLM": own_class}, "early_exit": early_exit}


def early_exit_class(model: ModelConfig) -> str:
    """Returns the class of the modelling file that loads the model."""
    return f"EarlyExit{HUGGINGFACE_CLASSES[model.family]}"
