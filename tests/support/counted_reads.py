"""Counts what is read of bucket files."""

from __future__ import annotations

from typing import Any

import pytest

from twhin_pipeline.graph import bucket_file


def counted_reads(monkeypatch: pytest.MonkeyPatch, at_once: int) -> list[int]:
    """The bytes of each read, added as they are made, where `at_once` bytes are read at a time."""
    monkeypatch.setattr(bucket_file, "BYTES_AT_ONCE", at_once)
    reads: list[int] = []
    plain = bucket_file.read_at

    def read_at(*arguments: Any) -> None:
        reads.append(arguments[1].nbytes)
        plain(*arguments)

    monkeypatch.setattr(bucket_file, "read_at", read_at)
    return reads
