"""Local copies of tables: made once, whole."""

import threading
import time
from pathlib import Path

import pyarrow as pa

from twhin_pipeline.store import Store
from twhin_pipeline.store.array_cache import cached


def test_of_several_that_open_a_table_at_once_one_makes_its_copy(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.replace("table", "2025-01-01", config_hash="test") as draft:
        draft.write(pa.table({"a": [1]}))
    made = []

    def build(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        (folder / "done").touch()

    found: list[Path] = []
    manifest = store.manifest("table", "2025-01-01")
    threads = [threading.Thread(target=lambda: found.append(cached(store, manifest, build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(set(found)) == 1 and (found[0] / "done").exists()
    assert cached(store, manifest, build, "_other") != found[0] and len(made) == 2
