"""A merged Hugging Face folder: the model's own files as they are, its exits beside them, and one file that makes them leave early.

transformers' stock class reads the folder as the plain model; with trust_remote_code=True it takes `modeling_early_exit.py`.
"""
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ee_tuning.checkpoint.aside import written_aside
from ee_tuning.checkpoint.convert import model_name
from ee_tuning.checkpoint.exit_heads import CONFIG, ExitHeadsConfig, ExitHeadsReader, check_bound_to
from ee_tuning.checkpoint.fingerprint import fingerprint
from ee_tuning.checkpoint.huggingface import HuggingFaceReader
from ee_tuning.checkpoint.manifest import MANIFEST, check_replaceable, write_manifest
from ee_tuning.checkpoint.model_card import export_card
from ee_tuning.config import Config
from ee_tuning.errors import InputError
from ee_tuning.model.config import read_model_config

MODELLING = Path(__file__).parent / "exported" / "modeling_early_exit.py"
_CLASS = f"{MODELLING.stem}.EarlyExitLlamaForCausalLM"
_CHUNK = 16 << 20


def export_huggingface(config: Config, output: Path, *, links: bool = False, overwrite: bool = False) -> None:
    """Writes model.path with the exits of exits.path, where given, to `output`; without exits a plain copy.

    The backbone's shards are copied byte for byte, or with `links` linked (a hard link, or a relative symbolic one to another disk).
    Raises InputError where model and exits do not belong together or `output` can not be written; then nothing is left behind.
    """
    folder = Path(config.model.path)
    model = read_model_config(folder)
    check_replaceable(output, overwrite)
    with HuggingFaceReader(folder) as reader:
        reader.check_complete(model)
        artifact = None
        if config.exits.path is not None:
            artifact = ExitHeadsReader(Path(config.exits.path), verifies=config.exits.verify)
            check_bound_to(artifact, fingerprint(reader, model))
            artifact.check_complete(model)
            _check_heads(artifact.config)
        weights = [folder / name for name in sorted(set(reader.files.values()))]
    exit_files = [artifact.folder / name for name in sorted(set(artifact.files.values()))] if artifact else []
    described = _described_config(folder, artifact.config if artifact else None, exit_files)
    with written_aside(output, None) as partial, _progress(sum(path.stat().st_size for path in [*weights, *exit_files])) as bar:
        _check_room(partial, output, exit_files if links else [*weights, *exit_files])
        sums = {path.name: _placed(path, partial / path.name, output, links and path in weights, bar) for path in [*weights, *exit_files]}
        for path in _companions(folder):
            sums[path.name] = _placed(path, partial / path.name, output, False, None)
        name = model_name(folder)
        if artifact:
            sums[MODELLING.name] = _placed(MODELLING, partial / MODELLING.name, output, False, None)
        (partial / "README.md").write_text(export_card(name, described.get("early_exit")))
        # Last but for the manifest: what a killed export leaves has no config.json, and loads nowhere.
        if described == json.loads((folder / "config.json").read_text()):
            _placed(folder / "config.json", partial / "config.json", output, False, None)
        else:
            (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        write_manifest(partial, sums)


def _check_heads(exits: ExitHeadsConfig) -> None:
    """Raises InputError where the modelling file has no such heads."""
    for layer, architecture in zip(exits.exit_layers, exits.architecture, strict=True):
        if architecture in ("layer", "adapter"):
            raise InputError(f"--format hf writes embedding, norm and mlp heads, got {architecture} after layer {layer}; "
                             "leave that exit out (export --format artifact --drop)")


def _described_config(folder: Path, exits: ExitHeadsConfig | None, files: list[Path]) -> dict[str, Any]:
    """config.json, with what the modelling file needs to know; without exits, without what an earlier export put in."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    others = {key: value for key, value in raw.get("auto_map", {}).items() if value != _CLASS}
    plain = {key: value for key, value in raw.items() if key not in ("early_exit", "auto_map")}
    if exits is None:
        return {**plain, "auto_map": others} if others else plain
    tree = json.loads((files[0].parent / CONFIG).read_text())
    told = {key: tree[key] for key in ("exit_layers", "architecture", "output", "init", "seed", "tuned", "origins", "model_fingerprint")
            if key in tree}
    return {**plain, "auto_map": {**others, "AutoModelForCausalLM": _CLASS}, "early_exit": {**told, "files": [path.name for path in files]}}


def _companions(folder: Path) -> list[Path]:
    """What belongs to the model besides weights and config.json: tokenizer, generation defaults, licence."""
    def belongs(name: str) -> bool:
        if name in (MANIFEST, "config.json", CONFIG) or name.endswith(".index.json"):
            return False
        return Path(name).suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") or name.upper().startswith(
            ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY"))
    return [path for path in sorted(folder.iterdir()) if path.is_file() and belongs(path.name)] + sorted(
        folder.glob("model.safetensors.index.json") if not (folder / "model.safetensors").exists() else [])


def _placed(source: Path, target: Path, output: Path, links: bool, bar: "_Bar | None") -> str:
    """Copies a file, or links it, and returns its sha256."""
    digest = hashlib.sha256()
    real = source.resolve()
    if links:
        try:
            os.link(real, target)
        except OSError:  # another disk, or one without hard links
            target.symlink_to(os.path.relpath(real, output.parent.resolve() / output.name))
    with source.open("rb") as given, open(os.devnull if links else target, "wb") as made:
        while chunk := given.read(_CHUNK):
            made.write(chunk)
            digest.update(chunk)
            if bar is not None:
                bar.advance(len(chunk))
        if not links:
            made.flush()
            os.fsync(made.fileno())
    return digest.hexdigest()


def _check_room(partial: Path, output: Path, files: list[Path]) -> None:
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(partial).free
    if free < needed:
        raise InputError(f"{output} takes {needed:,} bytes, and {free:,} are free there; make room, choose another folder, or give --link")


class _Bar:
    def __init__(self, progress: Progress, total: int):
        self._progress, self._task = progress, progress.add_task("writing the model", total=total)

    def advance(self, num_bytes: int) -> None:
        """So many bytes are done."""
        self._progress.advance(self._task, num_bytes)


@contextmanager
def _progress(total: int) -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield _Bar(progress, total)
