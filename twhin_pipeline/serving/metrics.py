"""What Prometheus reads: counts of all workers together.

Where several processes serve, each writes its numbers to files in `PROMETHEUS_MULTIPROC_DIR`, and whoever answers
`/metrics` adds them up (prometheus_client's multiprocess mode). The variable is set before this module is imported.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

FOLDER_ENV = "PROMETHEUS_MULTIPROC_DIR"
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Bounds of the latency histogram, s."""
_LIVE = re.compile(r"gauge_live\w*_(?P<pid>\d+)\.db")


class Metrics:
    """The numbers of one worker."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "twhin_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "twhin_request_seconds",
            "Seconds from a request's first byte to its response's last.",
            ["endpoint"],
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.release = Gauge(
            "twhin_release_workers",
            "Workers that answer from this release.",
            ["release", "snapshot"],
            multiprocess_mode="livesum",
            registry=self._registry,
        )
        self.failing = Gauge(
            "twhin_release_failing",
            "Workers that could not open the release that is current, and answer from the one before.",
            multiprocess_mode="livesum",
            registry=self._registry,
        )
        self.swaps = Counter("twhin_swaps", "Changes to another release, by any worker.", registry=self._registry)
        self.failures = Counter(
            "twhin_swap_failures", "Releases that a worker could not open, each try counted.", registry=self._registry
        )

    def text(self) -> bytes:
        """Return the numbers of all workers in Prometheus' text format."""
        folder = os.environ.get(FOLDER_ENV)
        if folder is None:
            return generate_latest(self._registry)
        forget_dead(Path(folder))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, folder)
        return generate_latest(registry)


def forget_dead(folder: Path) -> None:
    """Remove what workers said of themselves that have ended; what they counted stays."""
    pids = {int(found["pid"]) for path in folder.iterdir() if (found := _LIVE.fullmatch(path.name))}
    for pid in pids:
        if not psutil.pid_exists(pid):
            multiprocess.mark_process_dead(pid, str(folder))
