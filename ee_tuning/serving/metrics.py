"""Prometheus metrics: vLLM's names where the meaning is the same, with the prefix `ee_tuning:`, and those of exits."""

import time
from collections import defaultdict

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ee_tuning.engine.engine import Engine
from ee_tuning.generation.completion import Completion, StreamedToken

disable_created_metrics()
_PREFIX = "ee_tuning:"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """Counted in the event loop's thread."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._label = {"model_name": model_name}
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Tokens of prompts that the prefix cache had.")
        self.draft_tokens = self._counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self.accepted_tokens = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        self.accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were accepted, by their place among the drafts of a pass.",
            "position",
        )
        self.drafts = self._counter("spec_decode_num_drafts", "Passes that checked drafted tokens.")
        self.catch_up_tokens = self._counter(
            "catch_up_tokens", "Tokens that left early and were computed deeper later, once for each segment."
        )
        self.exit_tokens = self._counter(
            "exit_tokens", "Generated tokens by the layer that they left at.", "exit_layer"
        )
        self.depth = self._counter("token_layers", "Sum of the layers that generated tokens left at.")
        self.success = self._counter("request_success", "Finished completions.", "finished_reason")
        self.time_to_first = self._histogram("time_to_first_token_seconds", "Seconds to the first token.", _LONG)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Seconds between tokens.", _SHORT)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "Seconds of a completion.", _LONG)
        self.queue_time = self._histogram("request_queue_time_seconds", "Seconds in the queue.", _LONG)
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "Seconds from the queue to the first token.", _LONG
        )
        self.decode_time = self._histogram(
            "request_decode_time_seconds", "Seconds from the first token to the last.", _LONG
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a completion.", _SIZES
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _SIZES)
        self._last_token: dict[tuple[int, int], float] = {}

    def watch(self, engine: Engine) -> None:
        """Reads the engine's own figures whenever the metrics are requested."""
        self.registry.register(_EngineCollector(engine, self._model_name))

    def count_prompt(self, num_tokens: int, n: int) -> None:
        """Counts a prompt of a request."""
        self.prompt_tokens.inc(num_tokens)
        self.prefix_queries.inc(num_tokens * n)
        self.request_prompt_tokens.observe(num_tokens)

    def count_tokens(self, tokens: list[StreamedToken]) -> None:
        """Counts the tokens of a step."""
        now, by_layer = time.perf_counter(), defaultdict[int, int](int)
        for token in tokens:
            by_layer[token.exit_layer] += 1
            key = (token.index, token.completion)
            before = self._last_token.pop(key, None)
            if before is not None:
                self.inter_token.observe(now - before)
            if not token.is_last:
                self._last_token[key] = now
        self.generation_tokens.inc(len(tokens))
        self.depth.inc(sum(layer * count for layer, count in by_layer.items()))
        for layer, count in by_layer.items():
            self.exit_tokens.labels(**self._label, exit_layer=str(layer)).inc(count)

    def count_aborted(self, index: int, n: int) -> None:
        """Counts aborted completions of a job, and drops the times of their latest tokens."""
        for completion in range(n):
            self._last_token.pop((index, completion), None)
        self.success.labels(**self._label, finished_reason="abort").inc(n)

    def count_completion(self, completion: Completion) -> None:
        """Counts a finished completion."""
        statistics, label = completion.statistics, self._label
        self.success.labels(**label, finished_reason=completion.finish_reason).inc()
        if not completion.token_ids:  # the prompt was only scored, or failed
            return
        self.prefix_hits.inc(statistics.num_reused)
        self.draft_tokens.inc(statistics.num_drafted)
        self.accepted_tokens.inc(statistics.num_accepted)
        self.drafts.inc(statistics.num_checks)
        for position, count in enumerate(statistics.num_accepted_at):
            self.accepted_at.labels(**label, position=str(position)).inc(count)
        self.catch_up_tokens.inc(statistics.num_catch_up)
        first, waiting = statistics.seconds_to_first_token, statistics.seconds_waiting
        self.time_to_first.observe(first)
        self.queue_time.observe(waiting)
        self.prefill_time.observe(max(0.0, first - waiting))
        self.decode_time.observe(max(0.0, completion.seconds - first))
        self.end_to_end.observe(completion.seconds)
        self.request_generation_tokens.observe(len(completion.token_ids))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        """Returns a counter. A counter without further labels has this model's, and is shown as 0 before its first
        count.
        """
        counter = Counter(_PREFIX + name, doc, ("model_name", *labels), registry=self.registry)
        return counter if labels else counter.labels(**self._label)

    def _histogram(self, name: str, doc: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(_PREFIX + name, doc, ("model_name",), registry=self.registry, buckets=buckets)
        return histogram.labels(**self._label)


class _EngineCollector(Collector):
    """Figures of the engine at the moment. Read from another thread, they may be a step old."""

    def __init__(self, engine: Engine, model_name: str):
        self._engine, self._model_name = engine, model_name

    def collect(self) -> list[Metric]:
        engine, pool = self._engine, self._engine.cache.pool
        values = {
            "num_requests_running": (len(engine.running), "Completions that are decoded."),
            "num_requests_waiting": (len(engine.waiting), "Completions that wait."),
            "kv_cache_usage_perc": (1 - pool.num_free / pool.num_blocks, "Share of the KV cache in use, 0 to 1."),
        }
        found: list[Metric] = []
        for name, (value, doc) in values.items():
            gauge = GaugeMetricFamily(_PREFIX + name, doc, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            found.append(gauge)
        heads = CounterMetricFamily(_PREFIX + "seconds_in_heads", "Seconds in exit heads.", labels=["model_name"])
        heads.add_metric([self._model_name], engine.seconds_in_heads)
        return [*found, heads]
