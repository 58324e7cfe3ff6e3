"""The folder of a comparison: one job's alone, and known as such."""

import hashlib
from pathlib import Path
from typing import Any

from ee_tuning.comparison.job import JOB_FILE, CompareOptions, Comparison
from ee_tuning.comparison.texts import FOLDER, SETTINGS
from ee_tuning.config import Config, save_config
from ee_tuning.config.paths import is_number
from ee_tuning.data.cache import file_stamps
from ee_tuning.data.indexed import with_suffix
from ee_tuning.data.sources import BIN_SUFFIX, INDEX_SUFFIX, find_corpora
from ee_tuning.differences import differences_text
from ee_tuning.errors import InputError
from ee_tuning.json_file import parse_json, to_json
from ee_tuning.storage.apart import check_apart, check_folder_writable
from ee_tuning.storage.atomic_write import atomic_file

OWNER = ".owner"
"""The file that names the process at work."""
MARK = f"{FOLDER}/{SETTINGS}"
"""The settings of the job, written together with its texts."""
RATES = "learning rates"
"""The setting that only the ways asked for have a part in."""


def check_folder(config: Config, options: CompareOptions) -> None:
    """Raises InputError where the output can not be written, is or holds an input, or is of something else."""
    data, output = config.data, options.output
    sources = (config.model.path, data.tokenizer, data.chat_template, *data.paths, *data.valid_paths, *options.tasks)
    check_apart(output, sources, around=True)
    check_folder_writable(output)
    if not output.is_dir() or (output / MARK).is_file():
        return
    unfinished = f"{FOLDER}.partial-"  # texts that a kill left half written
    others = [path.name for path in output.iterdir() if path.name != OWNER and not path.name.startswith(unfinished)]
    if others:
        raise InputError(
            f"--output must be a new folder or that of a comparison, and {output} holds {others[0]}; give another --output"
        )


def check_same(output: Path, settings: dict[str, Any]) -> None:
    """Raises InputError where the folder is of another job. The rates of further ways are added to its settings."""
    if not (output / MARK).is_file():
        return
    try:
        there = parse_json((output / MARK).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{output / MARK} can not be read: {error}; give another --output") from error
    if not isinstance(there, dict) or not isinstance(there.get(RATES, {}), dict):
        raise InputError(f"{output / MARK} holds no settings of a comparison; give another --output")
    rates, former = settings[RATES], there.get(RATES, {})
    if differences := differences_text(_flat(there, {**rates, **former}), _flat(settings, {**former, **rates})):
        raise InputError(
            f"{output} holds a comparison of another job, which differs in {differences}; give that job, or another --output"
        )
    if not rates.keys() <= former.keys():
        with atomic_file(output / MARK) as temporary:
            temporary.write_text(to_json({**there, RATES: {**former, **rates}}, indent=1) + "\n", encoding="utf-8")


def _flat(settings: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    others = {key: value for key, value in settings.items() if key != RATES}
    return {**others, **{f"learning rate of {way}": rate for way, rate in rates.items()}}


def write_job(comparison: Comparison) -> None:
    """Writes the job that all steps share."""
    with atomic_file(comparison.folder / JOB_FILE) as temporary:
        save_config(comparison.config, temporary)


def data_stamp(config: Config) -> str:
    """Returns a short identifier of the data's files. Raises InputError where they can not be read."""
    data, files = config.data, list[Path]()
    for paths, key in ((data.paths, "data.paths"), (data.valid_paths, "data.valid_paths")):
        for corpus in find_corpora(paths, key, data.text_key) if paths or key == "data.paths" else ():
            tokens = (
                with_suffix(prefix, suffix) for prefix in corpus.prefixes for suffix in (BIN_SUFFIX, INDEX_SUFFIX)
            )
            files += [*corpus.texts, *tokens]
    # Names without folders, so that data may move.
    stamps = [[Path(path).name, size, time] for path, size, time in file_stamps(files)]
    weights = [path for path in data.paths if is_number(path)]
    digest = hashlib.sha256(to_json([stamps, weights]).encode()).hexdigest()
    return f"{len(files)} files, {sum(size for _, size, _ in stamps):,} bytes, {digest[:8]}"
