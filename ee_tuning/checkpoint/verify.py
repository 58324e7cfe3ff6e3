"""`ee-tuning verify`: every file of what this project wrote against its sha256 manifest, and nothing else."""
from pathlib import Path

from ee_tuning.checkpoint.manifest import MANIFEST, check_file, read_manifest
from ee_tuning.errors import InputError

_REMEDY = "fetch or make the folder again"


def verify_folder(folder: Path) -> None:
    """Prints one line per file of an artifact, a run's checkpoint or an export; of a run folder, of all that stands in it.

    Raises InputError, naming the file, at the first that is missing or altered, and where `folder` holds nothing with a manifest.
    """
    folders = [folder] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"**/{MANIFEST}"))
    if not folders:
        raise InputError(f"verify takes a folder that this project wrote, which holds {MANIFEST}, and {folder} "
                         f"{'does not' if folder.exists() else 'is not there'}")
    for each in folders:
        _check(each)


def _check(folder: Path) -> None:
    files = read_manifest(folder, _REMEDY)
    for name, entry in files.items():
        check_file(folder / name, entry, _REMEDY)
        print(f"{folder / name}  whole, {entry['bytes']:,} bytes", flush=True)  # a large folder takes minutes: each is told when done
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.name != MANIFEST:
            print(f"{path}  not in the manifest, not checked")
