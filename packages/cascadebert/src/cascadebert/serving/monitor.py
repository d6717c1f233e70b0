"""What the service tells Prometheus: who left where, how sure, how long it took, and drift.

No metric and no label holds anything that a caller wrote.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import Lock

import numpy as np

#: Seconds; a small model's batch takes milliseconds, a large one's on a CPU some seconds.
BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 30.0)


class Drift:
    """Population stability index of a score against the deciles it had on calibration rows.

    The sum of (p - q) log(p / q) over the ten parts, q the share that the calibration rows had there
    and p that of the last items; by custom 0.1 is a small shift and 0.25 a large one.

    Args:
        deciles: of the score on the calibration rows, rising; equal ones are one part.
        window: how many items are looked back upon.
        least: fewer items than this are no evidence, and give 0.
    """

    def __init__(self, deciles: Sequence[float], window: int = 2000, least: int = 200) -> None:
        self.edges, sizes = np.unique(np.asarray(deciles, dtype=float), return_counts=True)
        self.expected = np.append(sizes, 1) / (len(deciles) + 1)
        self._least = least
        self._last: deque[int] = deque(maxlen=window)
        self._lock = Lock()  # a stage's thread adds while a request reads

    def __len__(self) -> int:
        return len(self._last)

    def add(self, scores: Sequence[float]) -> None:
        """Take note of items' scores."""
        parts = np.searchsorted(self.edges, scores, side="left").tolist()
        with self._lock:
            self._last.extend(parts)

    @property
    def psi(self) -> float:
        """The index over the window; half an item is added to each part, so none is empty."""
        with self._lock:
            last = list(self._last)
        if len(last) < self._least:
            return 0.0
        counts = np.bincount(last, minlength=len(self.expected)) + 0.5
        shares = counts / counts.sum()
        return float(((shares - self.expected) * np.log(shares / self.expected)).sum())


class Monitor:
    """The metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

        self.registry = CollectorRegistry()
        common = {"namespace": "cascadebert", "registry": self.registry}
        self._requests = Counter(
            "requests", "Requests by path and HTTP status.", ["path", "status"], **common
        )
        self._request_seconds = Histogram(
            "request_seconds", "From a call's arrival to its answer.", buckets=BUCKETS, **common
        )
        self._items = Counter(
            "items", "Texts by the stage that answered.", ["operating_point", "stage"], **common
        )
        self._confidence = Summary(
            "confidence", "Of the answers; sum over count is the mean.", ["stage"], **common
        )
        self._stage_seconds = Histogram(
            "stage_seconds", "A text's time at a stage, waiting and computing.", ["stage"],
            buckets=BUCKETS, **common,
        )  # fmt: skip
        self._batches = Counter("batches", "Batches that a stage ran.", ["stage"], **common)
        self._depth = Gauge("queue_depth", "Texts that wait at a stage.", ["stage"], **common)
        self._shed = Counter(
            "shed", "Texts that left early because the next stage was overloaded.", **common
        )
        self._truncated = Counter("truncated", "Texts longer than their stage takes.", **common)
        self._psi = Gauge(
            "drift_psi",
            "Stability index of the first stage's score against the calibration rows.",
            ["operating_point"], **common,
        )  # fmt: skip
        self._drift: dict[str, Drift] = {}

    def watch(
        self,
        depths: Sequence[Callable[[], int]],
        deciles: Mapping[str, Sequence[float] | None],
    ) -> None:
        """Name the stages and the operating points, so that they show from the start.

        Args:
            depths: how many texts wait at each stage.
            deciles: of each operating point, where its policy has them.
        """
        for stage, depth in enumerate(depths, 1):
            self._depth.labels(stage).set_function(depth)
            self._stage_seconds.labels(stage)
            self._confidence.labels(stage)
            for point in deciles:
                self._items.labels(point, stage)
        for point, values in deciles.items():
            if values:
                drift = self._drift[point] = Drift(values)
                self._psi.labels(point).set_function(lambda drift=drift: drift.psi)

    def request(self, path: str, status: int, seconds: float | None = None) -> None:
        """A request was answered; `seconds` for those whose latency matters."""
        self._requests.labels(path, status).inc()
        if seconds is not None:
            self._request_seconds.observe(seconds)

    def batch(self, stage: int, seconds: Sequence[float]) -> None:
        """A stage, from 0, ran a batch of texts that had been there for so long."""
        self._batches.labels(stage + 1).inc()
        histogram = self._stage_seconds.labels(stage + 1)
        for value in seconds:
            histogram.observe(value)

    def scored(self, point: str, scores: Sequence[float]) -> None:
        """The first stage's scores of some texts."""
        if point in self._drift:
            self._drift[point].add(scores)

    def answered(
        self, point: str, stage: int, confidence: float, degraded: bool, truncated: bool
    ) -> None:
        """A stage, from 1, answered a text."""
        self._items.labels(point, stage).inc()
        self._confidence.labels(stage).observe(confidence)
        self._shed.inc(degraded)
        self._truncated.inc(truncated)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
