"""`ee-tuning verify`: checks this project's files against their manifests, and other models as far as their format
allows.
"""

from pathlib import Path

from ee_tuning.checkpoint.formats import has_weights
from ee_tuning.checkpoint.gguf_file import is_gguf
from ee_tuning.checkpoint.verify_foreign import verify_foreign
from ee_tuning.errors import InputError
from ee_tuning.storage.manifest import MANIFEST, check_file, file_names, holds_manifest, read_manifest

_REMEDY = "fetch or make the folder again"


def verify_folder(folder: Path, *, trust_pickle: bool = False) -> bool:
    """Prints one line per checked file. Returns False where the model holds NaN or infinity.

    It checks an artifact, a run's checkpoint or an export; in a run folder, all of these; of a model without a
    manifest, its files and all of this project's folders inside. `trust_pickle` is as in the model section. Raises
    InputError, naming the file, at the first one that is missing or altered, and where `folder` holds nothing that can
    be checked.
    """
    if holds_manifest(folder):
        _check(folder)
        return True
    if is_gguf(folder):
        return verify_foreign(folder, trust_pickle=trust_pickle)
    if not folder.is_dir():
        raise InputError(f"verify takes a folder or a GGUF file, and {folder} is not there")
    within = sorted(path.parent for path in folder.glob(f"**/{MANIFEST}") if holds_manifest(path.parent))
    is_finite = verify_foreign(folder, trust_pickle=trust_pickle) if has_weights(folder) or not within else True
    for each in within:
        _check(each)
    return is_finite


def _check(folder: Path) -> None:
    files = read_manifest(folder, _REMEDY)
    for name, entry in files.items():
        check_file(folder / name, entry, _REMEDY)
        # A large folder takes minutes, so each is reported when done.
        print(f"{folder / name}  whole, {entry['bytes']:,} bytes", flush=True)
    for name in file_names(folder):
        if name not in files and name != MANIFEST:
            print(f"{folder / name}  not in the manifest, not checked")
