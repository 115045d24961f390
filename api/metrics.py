"""What the server measures of requests, and the text of /metrics. Does not know: what a call does.

The names are those of docs/operations.md; no label has values that grow with users.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from htm_service.metrics import SECONDS
from htm_service.records import EngineInfo, Timing

COUNTED = {
    "skipped": ("htm_skipped", "Work whose caller had gone before it began."),
    "appended_tokens": ("htm_appended_tokens", "Tokens that were appended."),
    "attended_queries": ("htm_attended_queries", "Queries that were answered with attention."),
    "searched_queries": ("htm_searched_queries", "Queries whose best tokens were found by a search."),
    "payload_cache_hits": ("htm_payload_cache_hits", "Tokens of answers whose payloads were in host memory."),
    "payload_cache_misses": ("htm_payload_cache_misses", "Tokens of answers whose payloads were not."),
    "fetched_pages": ("htm_pages_fetched", "Pages that were read from the store for an attend."),
    "offloaded_pages": ("htm_pages_offloaded", "Pages that were taken off the device."),
    "trimmed_tokens": ("htm_tokens_trimmed", "Tokens that sessions let go to stay within max_tokens."),
    "model_swaps": ("htm_model_swaps", "Models that were replaced by other weights."),
    "expired_sessions": ("htm_sessions_expired", "Sessions that were deleted after their ttl_s."),
}
"""The engine's totals since its start, and what they are called here."""
TIERS = {
    "device": "device_bytes",
    "device_keys": "device_key_bytes",
    "device_sketches": "device_sketch_bytes",
    "payload_cache": "payload_cache_bytes",
    "disk": "disk_bytes",
}
QUEUES = ("device", "store", "payloads")


class Measured:
    """One request, while it is answered: the call it turned out to be, the code of its error, where its time went."""

    __slots__ = ("began", "call", "code", "parsed_at", "timing", "worked_at")

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.call = "other"
        """An operationId of openapi.json, or `other`: a page, a path that there is not."""
        self.code = ""
        self.parsed_at = self.worked_at = 0.0
        """Of a hot call: when its body was read, and when the engine was done."""
        self.timing: Timing | None = None

    def worked(self, first: Timing, second: Timing | None = None) -> Timing:
        """The engine is done with a hot call; the timing of the call, the sum of its parts'."""
        self.worked_at = time.perf_counter()
        self.timing = first if second is None else first.plus(second)
        return self.timing


class Metrics:
    """Requests since the server's start. On the event loop.

    Those of a turn of the loop are counted together after it, as all that one batch answered: alone, each comes to
    code and memory that are in no cache, and takes four times as long.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time for each series, which Prometheus does not ask for
        self._registry = CollectorRegistry()
        names = ["call", "status"]
        self._requests = Counter("htm_requests", "Requests that were answered.", names, registry=self._registry)
        self._seconds = Histogram(
            "htm_request_seconds",
            "From a request's headers to the end of its answer.",
            ["call"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._series: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._errors = Counter("htm_errors", "Errors by their code.", ["code"], registry=self._registry)
        self._answered: list[tuple[Measured, int, float]] = []
        """Requests that are not counted yet, their statuses, and how many seconds they took."""

    @property
    def registry(self) -> CollectorRegistry:
        """All that was counted until now."""
        self._settle()
        return self._registry

    def count(self, request: Measured, status: int) -> None:
        """A request that was answered just now."""
        if not self._answered:
            asyncio.get_running_loop().call_soon(self._settle)
        self._answered.append((request, status, time.perf_counter() - request.began))

    def _settle(self) -> None:
        answered, self._answered = self._answered, []
        for request, status, seconds in answered:
            series = self._series.get((request.call, status))
            if series is None:  # to look for it in the library each time costs as much as to count
                found = self._requests.labels(request.call, str(status)), self._seconds.labels(request.call)
                series = self._series[request.call, status] = found
            series[0].inc()
            series[1].observe(seconds)
            if request.code:
                self._errors.labels(request.code).inc()


class EngineTotals(Collector):
    """What an engine counts, as it is at one moment."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info

    def collect(self) -> Iterator[Metric]:
        """All families."""
        info, totals = self._info, self._info.totals
        for total, (name, meaning) in COUNTED.items():
            yield CounterMetricFamily(name, meaning, totals[total])
        yield _gauges("htm_bytes", "Bytes in use.", "tier", {tier: totals[name] for tier, name in TIERS.items()})
        yield _gauges("htm_waiting", "Items that wait.", "queue", {name: totals[f"waiting_{name}"] for name in QUEUES})
        cold = totals["sessions"] - totals["resident_sessions"]
        states = {"resident": totals["resident_sessions"], "cold": cold}
        yield _gauges("htm_sessions", "Sessions.", "state", states)
        labels = {"version": info.version, "device": info.device, "kernel": info.kernel}
        yield InfoMetricFamily("htm_build", "What runs here.", {**labels, "python": platform.python_version()})


def exposition(collectors: Iterable[Collector]) -> bytes:
    """The text of /metrics, in Prometheus' format."""
    return b"".join(generate_latest(collector) for collector in collectors)


def _gauges(name: str, meaning: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, meaning, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
