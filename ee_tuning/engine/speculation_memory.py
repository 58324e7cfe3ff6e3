"""Stores how often an artifact's exits and repeated text were right, for later processes.

The cache folder has a file for each artifact, dtype, number of threads and machine. Without it, a process must try its
exits before it can plan, which a short process never finishes. Tokens do not depend on it.
"""

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ee_tuning.cache_folder import cache_folder
from ee_tuning.engine.prompt_lookup import MOST_LENGTH, MatchRecord
from ee_tuning.engine.speculation import EDGES, ExitRecord, Speculation
from ee_tuning.engine.stage_model import StageModel
from ee_tuning.errors import InputError
from ee_tuning.json_file import read_json, to_json
from ee_tuning.kernel.build import processor
from ee_tuning.storage.atomic_write import atomic_file

FORMAT = 4
"""Version of the file. Raise it when the meaning of its content changes."""
FEWEST_ROUNDS = 40
"""Rounds before the first write. Each later write needs twice as many as the one before."""

log = logging.getLogger(__name__)


class SpeculationMemory:
    """The file of an engine's exits."""

    def __init__(self, path: Path, key: dict[str, Any]):
        """`key` holds everything that the figures depend on, as plain data."""
        self.path, self._key = path, key
        self._rounds_kept = 0

    def recall(self, speculation: Speculation) -> None:
        """Gives `speculation` the stored records, if there is a usable file."""
        try:
            tree = read_json(self.path)
            records, matches = self._read(tree, speculation.records)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning(
                "%s is not a valid record of speculation and is replaced: %s",
                self.path,
                str(error).replace("\n", " ")[:200],
            )
            return
        speculation.records.update(records)
        speculation.matches = matches

    def keep(self, speculation: Speculation) -> None:
        """Stores the records, if enough of them are new. A folder that can not be written is only logged."""
        if speculation.num_rounds < max(FEWEST_ROUNDS, 2 * self._rounds_kept):
            return
        self._rounds_kept = speculation.num_rounds
        records = {str(layer): asdict(record) for layer, record in speculation.records.items()}
        tree = {"format": FORMAT, "key": self._key, "records": records, "matches": asdict(speculation.matches)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_file(self.path) as partial:
                partial.write_text(to_json(tree) + "\n", encoding="utf-8")
        except (OSError, InputError) as error:
            log.info("records of speculation are not saved: %s", error)

    def _read(self, tree: Any, layers: Iterable[int]) -> tuple[dict[int, ExitRecord], MatchRecord]:
        if tree["format"] != FORMAT or tree["key"] != self._key:
            raise ValueError("it is of another format, model or machine")
        records = {layer: ExitRecord(*_counts(tree["records"][str(layer)], len(EDGES))) for layer in layers}
        return records, MatchRecord(*_counts(tree["matches"], MOST_LENGTH + 1))


def speculation_memory(stage: StageModel, heads_digest: str | None) -> SpeculationMemory | None:
    """Returns the memory of a model with these exits; None for several ranks, whose records must be equal, and for
    heads without a digest.
    """
    if heads_digest is None or stage.topology.num_in_replica > 1:
        return None
    device = stage.topology.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    key = {
        "heads": heads_digest,
        "dtype": str(stage.model.plan.dtype),
        "threads": torch.get_num_threads(),
        "kernels": stage.is_native,
        "machine": hashlib.sha256(machine.encode()).hexdigest()[:16],
        "segments": [asdict(segment) for segment in stage.segments],
    }
    name = hashlib.sha256(to_json(key, sort_keys=True).encode()).hexdigest()[:32]
    return SpeculationMemory(cache_folder() / "speculation" / f"{name}.json", key)


def _counts(given: Any, size: int) -> tuple[list[float], list[float]]:
    """Parses the counts of seen and of right tokens."""
    seen, right = (list(_numbers(given[name], size)) for name in ("seen", "right"))
    if any(more > count for count, more in zip(seen, right, strict=True)):
        raise ValueError("drafts were right more often than they were looked at")
    return seen, right


def _numbers(given: Any, count: int) -> tuple[float, ...]:
    numbers = tuple(float(number) for number in given)
    if len(numbers) != count or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"{given!r:.80} is not {count} numbers from 0 up")
    return numbers
