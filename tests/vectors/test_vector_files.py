"""Vectors as plain files: those that the model gives, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_store
from small_store import SNAPSHOT

from twhin_pipeline import load_model
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.errors import UserError
from twhin_pipeline.vectors import vector_files
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.reader import TwhinEmbeddings


@pytest.fixture
def model(tmp_path: Path) -> TwhinEmbeddings:
    small = small_store.make(tmp_path, config=small_store.config())
    export(small.config, small.store, SNAPSHOT)
    return load_model(small.store.root)


@pytest.mark.parametrize("untrained", [True, False])
@pytest.mark.parametrize("size", [7, 65_536])
def test_batches_are_what_get_embedding_returns(model: TwhinEmbeddings, untrained: bool, size: int) -> None:
    for entity in model.entities:
        batches = list(model.batches(entity, size, untrained=untrained))
        ids = [one for batch in batches for one in batch.column("id").to_pylist()]
        vectors = np.array([one for batch in batches for one in batch.column("embedding").to_pylist()], np.float32)
        assert len(ids) == model.count(entity, untrained=untrained) and max(map(len, batches)) <= size
        np.testing.assert_array_equal(vectors, model.get_embedding(entity, ids))
        trained = model.tables[entity].trained
        assert trained is not None
        assert len(ids) == (small_store.NUM[entity] if untrained else int(trained.sum()))


@pytest.mark.parametrize("data_type", ["fp32", "fp16"])
def test_both_formats_hold_the_same_vectors_by_id(model: TwhinEmbeddings, tmp_path: Path, data_type: str) -> None:
    for kind in vector_files.FORMATS:
        vector_files.write(model, tmp_path / "out", ["user", "item"], kind=kind, data_type=data_type)
    for entity in ("user", "item"):
        table = pq.read_table(tmp_path / "out" / f"{entity}.parquet")
        ids = pq.read_table(tmp_path / "out" / f"{entity}.ids.parquet")["id"].to_pylist()
        array = np.load(tmp_path / "out" / f"{entity}.npy")
        assert ids == table["id"].to_pylist() and array.dtype == np.dtype(vector_files.ELEMENTS[data_type])
        np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), array.dtype), array)
        np.testing.assert_array_equal(array, model.get_embedding(entity, ids).astype(array.dtype))


def test_files_are_in_the_space_that_was_asked_for(model: TwhinEmbeddings, tmp_path: Path) -> None:
    model.maps = {"item": np.random.default_rng(0).normal(size=(small_store.DIM, 3))}
    [path] = vector_files.write(model, tmp_path / "out", ["item"])
    table = pq.read_table(path)
    expected = model.get_embedding("item", table["id"].to_pylist())
    assert expected.shape[1] == 3
    np.testing.assert_allclose(np.array(table["embedding"].to_pylist()), expected, rtol=1e-6)
    with pytest.raises(UserError, match="vectors of user have no map"):
        vector_files.write(model, tmp_path / "out", ["user"])


@pytest.mark.parametrize("kind", vector_files.FORMATS)
def test_a_file_is_replaced_whole_or_not_at_all(
    model: TwhinEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "out"
    vector_files.write(model, folder, ["user"], kind=kind)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def breaks(self: TwhinEmbeddings, entity: str, size: int = 5, *, untrained: bool = False) -> object:
        yield from list(whole(self, entity, size, untrained=untrained))[:1]
        raise KeyboardInterrupt

    whole = TwhinEmbeddings.batches
    monkeypatch.setattr(TwhinEmbeddings, "batches", breaks)
    with pytest.raises(KeyboardInterrupt):
        vector_files.write(model, folder, ["user"], kind=kind)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_writes_each_type_and_says_what_is_wrong(
    model: TwhinEmbeddings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model.store is not None
    home = ["--home", model.store.root]
    assert run_arguments(["vectors", str(tmp_path / "out"), *home]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"{one}.parquet") for one in ("user", "item")]
    assert run_arguments(["vectors", str(tmp_path / "out"), "-e", "shop", *home]) == 2
    assert "shop" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run_arguments(["vectors", str(tmp_path / "file"), *home]) == 2
    assert "cannot be written" in capsys.readouterr().err
