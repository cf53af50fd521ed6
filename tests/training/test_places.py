"""A place that cannot be read or written is one clear line before anything starts."""

from __future__ import annotations

import pytest
from edge_files import SNAPSHOT, make_config, write
from tiny import config as tiny_config

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch


def config(**training: str) -> TwhinConfig:
    data = tiny_config().model_dump(mode="json", exclude_none=True)
    return parse_config({**data, "training": {**data["training"], **training}})


@pytest.mark.parametrize("place", ["/proc/x", "{file}/x", "nowhere://x"])
def test_checkpoints_that_cannot_be_written_are_one_clear_error_before_training_starts(tmp_path, place):
    (tmp_path / "file").write_text("")
    place = place.format(file=tmp_path / "file")
    told = rf"training\.save_dir: {place}: cannot be written \(.*\); give a folder or URL that can be written"
    with pytest.raises(UserError, match=told) as caught:
        launch.run(config(save_dir=place), "unused.yaml", [], Store(str(tmp_path / "home")), "2025-01-01")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "home").exists()


def test_an_earlier_model_behind_an_unknown_protocol_is_one_clear_error_before_training_starts(tmp_path):
    told = r"training\.initial_checkpoint_dir: nowhere://x: cannot be read \(Protocol not known"
    with pytest.raises(UserError, match=told):
        launch.check_places(config(initial_checkpoint_dir="nowhere://x"))


def test_a_folder_that_is_not_there_yet_takes_checkpoints(tmp_path):
    launch.check_places(config(save_dir=str(tmp_path / "a" / "b")))
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("home", ["/proc/x", "{file}/x"])
def test_a_store_that_cannot_be_made_is_one_clear_error(tmp_path, home):
    path = write(tmp_path / "e.parquet", [("a", "fav", "x")])
    store = Store(home.format(file=path))
    with pytest.raises(UserError, match=r"raw_edges.*: cannot be made \(.*\); choose another --home") as caught:
        raw_edges.ingest(make_config(path), store, SNAPSHOT)
    assert len(str(caught.value).splitlines()) == 1
