"""What an engine measures of its queues and commits, as Prometheus histograms in a registry of its own.

What it merely counts stands where it happens, as a number, and is read when somebody asks (`Engine.info`).
Does not know who reads it, nor what the items of a queue are.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds of what is timed: from a small attend to a deadline."""
ITEMS = tuple(2.0**power for power in range(13))
"""Upper bounds of the size of a batch, up to 4,096."""


class Metrics:
    """See the head of this module. Any thread may observe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.commit_seconds = self._histogram("htm_commit_seconds", "One transaction, its sync included.", SECONDS)
        self._queue_seconds = self._histogram("htm_queue_seconds", "From admission to a batch.", SECONDS, "queue")
        self._batch_seconds = self._histogram("htm_batch_seconds", "One batch.", SECONDS, "queue")
        self._batch_items = self._histogram("htm_batch_items", "Items of one batch.", ITEMS, "queue")

    def of_queue(self, name: str) -> QueueMetrics:
        """Those of one queue."""
        histograms = (self._queue_seconds, self._batch_seconds, self._batch_items)
        return QueueMetrics(*(histogram.labels(name) for histogram in histograms))

    def _histogram(self, name: str, meaning: str, bounds: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, meaning, labels, buckets=tuple(bounds), registry=self.registry)


class QueueMetrics:
    """The histograms of one queue."""

    def __init__(self, waits: Histogram, seconds: Histogram, items: Histogram) -> None:
        self._waits = waits
        self._seconds = seconds
        self._items = items

    def ran(self, waits_s: Iterable[float], num_items: int, seconds: float) -> None:
        """One batch ended: how long each of its items had waited, how many they were, how long it took."""
        for wait_s in waits_s:
            self._waits.observe(wait_s)
        self._items.observe(num_items)
        self._seconds.observe(seconds)
