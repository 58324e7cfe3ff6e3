"""Gathers the metrics of all stages on one rank, without blocking a stage: through the process groups' store, by
polling.

All stages post the same sequence of records. The logging rank writes a record to metrics.jsonl when the parts of all
stages have arrived.
"""

import json
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ee_tuning.json_file import to_json
from ee_tuning.line_file import read_lines
from ee_tuning.parallel.topology import Topology
from ee_tuning.storage.atomic_write import atomic_file

METRICS = "metrics.jsonl"
MetricsRecord = dict[str, Any]


class MetricsGatherer:
    """Posts this stage's parts of records. The logging rank gathers them and calls `on_record` with each record, in
    order.
    """

    def __init__(self, topology: Topology, on_record: Callable[[MetricsRecord], None]) -> None:
        self._topology, self._on_record = topology, on_record
        self._store = dist.distributed_c10d._get_default_store()
        self._expected: deque[int] = deque()
        self._lock = threading.Lock()
        self.num_posted = 0
        """Number of records posted so far."""

    def post(self, record: MetricsRecord) -> None:
        """Posts this stage's part of the next record.

        Values that are dictionaries are merged over the stages; of other values, that of the first stage counts.
        """
        if not self._topology.is_writer:
            return
        self._store.set(self._key(self.num_posted, self._topology.stage), json.dumps(record))  # json.dumps keeps NaN
        self.num_posted += 1
        if self._topology.is_logging_rank:
            self._expected.append(self.num_posted - 1)
            self.poll()

    def poll(self) -> None:
        """Gathers the records that have arrived completely. Returns at once."""
        with self._lock:
            while self._expected and self._store.check(self._keys(self._expected[0])):
                self._take()

    def finish(self, num_records: int | None = None) -> None:
        """Waits until the logging rank has gathered the first `num_records`, or all that it has posted itself.

        May be called from any thread, once every stage has posted them. It blocks the other threads meanwhile.
        """
        with self._lock:
            while self._expected and (num_records is None or self._expected[0] < num_records):
                self._store.wait(self._keys(self._expected[0]))
                self._take()

    def _take(self) -> None:
        whole: MetricsRecord = {}
        for key in self._keys(self._expected.popleft()):
            for name, value in json.loads(self._store.get(key)).items():
                whole[name] = (
                    {**whole[name], **value} if isinstance(value, dict) and name in whole else whole.get(name, value)
                )
            self._store.delete_key(key)
        self._on_record(
            {name: _sorted_by_layer(value) if isinstance(value, dict) else value for name, value in whole.items()}
        )

    def _keys(self, index: int) -> list[str]:
        return [self._key(index, stage) for stage in range(self._topology.pp)]

    def _key(self, index: int, stage: int) -> str:
        return f"ee_tuning/metrics/{index}/{stage}"


class MetricsFile:
    """metrics.jsonl, with one JSON object per line."""

    def __init__(self, path: Path, resume_after: int | None) -> None:
        """Starts an empty file, or keeps the records up to step `resume_after`. A killed run may have written more."""
        kept = []
        if resume_after is not None and path.exists():
            kept = [
                line + "\n"
                for line in read_lines(path, errors="replace")
                if (record := _parsed(line)) and record["step"] <= resume_after
            ]
        with atomic_file(path) as partial:  # a run killed here would lose its records
            partial.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: MetricsRecord) -> None:
        """Appends `record`. Numbers that are not finite become null, since JSON has no other notation for them."""
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file. Call it last."""
        self._file.close()


def _parsed(line: str) -> MetricsRecord | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None  # cut off when the run was killed
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) and "kind" in record else None


def _sorted_by_layer(values: MetricsRecord) -> MetricsRecord:
    return dict(sorted(values.items(), key=lambda item: int(item[0])))
