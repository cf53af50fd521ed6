"""`twhin accept` and `twhin verify`, as people call them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.store import Store, Verdict

S = "2025-01-01"


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(str(tmp_path / "home"))
    with store.replace("raw_edges", S, config_hash="c") as draft:
        draft.write(pa.table({"a": list(range(1000))}))
    return store


def test_a_failed_table_is_accepted_with_who_and_why(store, capsys):
    manifest = store.manifest("raw_edges", S)
    failed = [{"name": "edges_relations_kept", "passed": False, "blocking": True, "finding": ""}]
    store.judge(manifest, Verdict("failed", "now", failed))
    assert not store.exists("raw_edges", S)
    given = ["accept", "raw_edges", "--home", store.root]  # of the newest snapshot, which is held back
    assert run_arguments(given) == 2 and "--reason" in capsys.readouterr().err
    assert run_arguments([*given, "--reason", "a relation was retired"]) == 0
    assert "in spite of edges_relations_kept" in capsys.readouterr().out
    verdict = store.verdict("raw_edges", S, manifest.version)
    assert verdict.reason == "a relation was retired" and verdict.by and store.exists("raw_edges", S)


def test_a_table_that_did_not_fail_is_not_accepted(store, capsys):
    assert run_arguments(["accept", "raw_edges", "-s", S, "--home", store.root, "--reason", "x"]) == 2
    assert "has not been checked" in capsys.readouterr().err


def test_verify_names_each_damaged_file_and_ends_with_1(store, capsys):
    assert run_arguments(["verify", "--home", store.root]) == 0
    assert "1 versions" in (told := capsys.readouterr().out) and "none damaged" in told
    (path,) = (Path(file) for file in store.files("raw_edges", S))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert run_arguments(["verify", "raw_edges", "-s", S, "--home", store.root]) == 1
    assert "raw_edges of snapshot 2025-01-01 is damaged: part-00000.parquet" in capsys.readouterr().out
