"""Stops a training in this process at a step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from twhin_pipeline.training.dataset import EdgesDataset


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event that stops the training at this step."""
    stop, read = threading.Event(), 0
    original = EdgesDataset.__iter__

    def counted(self: EdgesDataset) -> Iterator[Any]:
        nonlocal read
        for batch in original(self):
            read += self.num_epochs > 1
            if read == steps - 1:  # the loop looks before it reads
                stop.set()
            yield batch

    monkeypatch.setattr(EdgesDataset, "__iter__", counted)
    return stop
