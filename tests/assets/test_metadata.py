"""Tables, counts and pictures as an asset's page shows them."""

from __future__ import annotations

import uuid
from typing import Any

import pyarrow as pa
import pytest
from dagster_tables import SNAPSHOT

from twhin_pipeline._dagster.assets import metadata
from twhin_pipeline.store import Store


def rows(value: Any) -> list[dict[str, Any]]:
    return [dict(record.data) for record in value.records]


def test_every_table_shows_rows_columns_with_their_meaning_size_place_and_preview(store):
    shown = metadata.of_table(store, store.manifest("vocabulary/user", SNAPSHOT))
    assert shown["dagster/row_count"] == 2
    row, name = shown["dagster/column_schema"].columns
    assert (row.name, name.name, name.description) == ("row", "name", None)
    assert row.description is not None and "embedding table" in row.description
    assert rows(shown["preview"])[0] == {"row": "1", "name": "a"}
    assert shown["size_mib"] > 0 and shown["path"].path.startswith(store.root)
    assert [row["table"] for row in rows(shown["parents"])] == ["raw_edges"]


def test_a_models_page_lists_what_is_beside_its_vectors(store):
    with store.replace("twhin_model", SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.table({"step": [1, 2, 3]}), "losses.parquet")
        draft.write(pa.table({"row": [0], "embedding": [[1.0]]}), "tables/user/part-00000.parquet")
    shown = metadata.of_table(store, store.manifest("twhin_model", SNAPSHOT))
    assert shown["dagster/row_count"] == 1
    assert [column.name for column in shown["dagster/column_schema"].columns] == ["row", "embedding"]
    assert rows(shown["parts"]) == [{"part": "losses", "rows": "3", "columns": "step"}]


def test_what_a_stage_counted_becomes_numbers_and_tables_with_the_headlines_first():
    details = {"edges": 3, "by_relation": {"fav": 2}, "plan": "a\nb", "none": None, "hidden": 1, "loss": 0.123456}
    shown = metadata.counts(details, first=["loss", "missing"], leave_out=["hidden"])
    assert list(shown) == ["loss", "edges", "by_relation", "plan"]
    assert (shown["loss"], shown["edges"]) == (0.1235, 3)
    assert rows(shown["by_relation"]) == [{"by_relation": "fav", "count": "2"}]
    assert "```\na\nb\n```" in shown["plan"].value


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.00123456, 0.001235), (98_765.4321, 98_765.0), (12.3456, 12.35), (0.0, 0.0), (-1.00004, -1)],
)
def test_measured_numbers_have_the_digits_that_mean_something_and_whole_parts_stay(value, shown):
    assert metadata.rounded(value) == shown


def test_counts_of_many_relations_show_the_largest_and_say_how_many_more():
    by_relation = {f"r{i:03d}": i for i in range(1_000, 1_237)}
    shown = rows(metadata.counts({"edges_per_relation": by_relation})["edges_per_relation"])
    assert shown[0] == {"edges_per_relation": "r1236", "count": "1,236"} and len(shown) == metadata.TABLE_ROWS + 1
    assert shown[-1] == {"edges_per_relation": "… and 217 more", "count": ""}


def test_a_thumbnail_is_short_enough_for_dagster_to_draw_on_the_page():
    svg = "<svg xmlns='http://www.w3.org/2000/svg'><path d='M1,2z' stroke='#0072B2'/></svg>"
    shown = metadata.thumbnail(svg, "loss").value
    assert shown.startswith("![loss](<data:image/svg+xml,%3Csvg") and "#" not in shown


@pytest.mark.parametrize("remote", [False, True])
def test_a_picture_is_a_file_that_goes_with_its_version_and_takes_no_room_in_an_event(store, remote):
    if remote:
        store = Store(f"memory://{uuid.uuid4().hex}")
        with store.replace("vocabulary/user", SNAPSHOT, config_hash="c") as draft:
            draft.write(pa.table({"row": [1]}))
    manifest = store.manifest("vocabulary/user", SNAPSHOT)
    shown = metadata.picture(store, manifest, "degrees", b"\x89PNG" + b"x" * 50_000)
    assert len(shown.path) < 300 and f"/{manifest.version}/_pictures/degrees.png" in shown.path
    assert store.fs.cat_file(shown.path).startswith(b"\x89PNG")
    store.verify(manifest)
    store.remove_version("vocabulary/user", SNAPSHOT, manifest.version)
    assert not store.fs.exists(shown.path)
