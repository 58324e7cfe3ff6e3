"""Joins the metrics of several replicas; each sample gets the label `engine`."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content-Type of metrics in Prometheus' text format."""


class _Families:
    """A registry of given families, for `generate_latest`."""

    def __init__(self, families: Iterable[Metric]):
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def joined_metrics(texts: Mapping[int, str], alive: Mapping[int, bool]) -> bytes:
    """Joins `texts`, the metrics of each replica in Prometheus' text format, and adds which replicas are alive."""
    families: dict[str, Metric] = {}
    for engine, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                joined.add_sample(sample.name, {**sample.labels, "engine": str(engine)}, sample.value)
    there = GaugeMetricFamily("ee_tuning:replica_up", "Whether the replica is there.", labels=["engine"])
    for engine, is_alive in sorted(alive.items()):
        there.add_metric([str(engine)], float(is_alive))
    return generate_latest(_Families([*families.values(), there]))
