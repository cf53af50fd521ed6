"""Vectors as plain files: those that the model gives, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_store
from safetensors.numpy import load_file
from small_store import SNAPSHOT

from twhin_pipeline import load_model
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.errors import UserError
from twhin_pipeline.vectors import compression, vector_files
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
    for kind in ("parquet", "npy"):
        vector_files.write(model, tmp_path / "out", ["user", "item"], kind=kind, data_type=data_type)  # type: ignore[arg-type]
    for entity in ("user", "item"):
        table = pq.read_table(tmp_path / "out" / f"{entity}.parquet")
        ids = pq.read_table(tmp_path / "out" / f"{entity}.ids.parquet")["id"].to_pylist()
        array = np.load(tmp_path / "out" / f"{entity}.npy")
        assert ids == table["id"].to_pylist() and array.dtype == np.dtype({"fp32": "f4", "fp16": "f2"}[data_type])
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


def read(folder: Path, entity: str, kind: str) -> dict[str, np.ndarray]:
    """Read what was written, as a program that knows the format alone does."""
    if kind == "safetensors":
        return load_file(folder / f"{entity}.safetensors")
    shared = {path.name.split(".")[1]: np.load(path) for path in folder.glob(f"{entity}.*.npy")}
    if kind == "npy":
        return {"embedding": np.load(folder / f"{entity}.npy"), **shared}
    table = pq.read_table(folder / f"{entity}.parquet")
    found = {name: np.array(table[name].to_pylist(), "u1" if shared else None) for name in table.column_names[1:]}
    return {**found, **shared}


def ids_of(folder: Path, entity: str, kind: str) -> list[object]:
    return pq.read_table(folder / f"{entity}{'' if kind == 'parquet' else '.ids'}.parquet")["id"].to_pylist()


@pytest.mark.parametrize("kind", vector_files.FORMATS)
def test_int8_is_within_half_a_step_of_each_vector_in_every_format(
    model: TwhinEmbeddings, tmp_path: Path, kind: str
) -> None:
    tmp_path /= "out"
    paths = vector_files.write(model, tmp_path, ["user", "item"], kind=kind, data_type="int8")
    assert sorted(paths) == sorted(tmp_path.iterdir())
    for entity in ("user", "item"):
        found, own = read(tmp_path, entity, kind), model.get_embedding(entity, ids_of(tmp_path, entity, kind))
        assert np.abs(found["embedding"]).max() == 127
        again = found["embedding"] * found["scale"][:, None]
        assert (np.abs(again - own) <= found["scale"][:, None] * 0.5001).all()
        said = json.loads((tmp_path / f"{entity}.compression.json").read_text())
        assert said["bytes_per_vector"] == small_store.DIM + 4 and 0.8 < said["recall@10"] <= 1
        assert said["error"] == pytest.approx(np.square(again - own).sum() / np.square(own).sum(), rel=0.01)


@pytest.mark.parametrize("kind", vector_files.FORMATS)
def test_pq_is_decoded_by_its_codebooks_in_every_format(
    model: TwhinEmbeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(compression, "LEAST_FOR_PQ", 4)
    learned = compression.codec("pq", np.random.default_rng(0).normal(size=(2_000, 8)).astype("f4"), "item")
    monkeypatch.setattr(compression, "codec", lambda *given: learned)
    tmp_path /= "out"
    vector_files.write(model, tmp_path, ["item"], kind=kind, data_type="pq")
    found, own = read(tmp_path, "item", kind), model.get_embedding("item", ids_of(tmp_path, "item", kind))
    codes, books = found["embedding"], found["codebooks"]
    assert codes.shape == (len(own), 2) and books.shape == (2, 256, 4) and codes.dtype == np.uint8
    for code, vector in zip(codes, own, strict=True):
        for part, number in enumerate(code):  # each part has the entry that is nearest to it
            away = np.square(books[part] - vector[4 * part : 4 * part + 4]).sum(axis=1)
            assert away[number] == pytest.approx(away.min(), rel=1e-4)
    again = np.concatenate([books[part, codes[:, part]] for part in range(2)], axis=1)
    np.testing.assert_array_equal(again, learned.decode({"embedding": codes}))


def test_loss_is_that_of_a_plain_comparison_of_the_nearest() -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    halved = compression.Codec(lambda x: {"embedding": x[:, :4]}, lambda a: np.pad(a["embedding"], ((0, 0), (0, 4))))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    part = vectors[:, :4] / np.linalg.norm(vectors[:, :4], axis=1, keepdims=True)
    shares = []
    for row in range(50):
        true = [one for one in np.argsort(-unit @ unit[row]) if one != row][:10]
        found = [one for one in np.argsort(-part @ unit[row, :4]) if one != row][:10]
        shares.append(len(set(true) & set(found)) / 10)
    found_loss = compression.loss(halved, vectors, queries=50)
    assert found_loss["recall@10"] == pytest.approx(np.mean(shares)) and found_loss["recall@10"] < 0.8
    assert found_loss["error"] == pytest.approx(np.square(vectors[:, 4:]).sum() / np.square(vectors).sum())
    assert compression.loss(compression.codec("fp32", vectors, "item"), vectors) == {"recall@10": 1.0, "error": 0.0}


def test_pq_of_few_vectors_says_what_to_do(model: TwhinEmbeddings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"item has \d+ vectors, and pq learns .* 9,984 at least; take int8"):
        vector_files.write(model, tmp_path / "out", ["item"], data_type="pq")
    assert not list((tmp_path / "out").iterdir())


def test_the_command_shows_what_compression_costs(
    model: TwhinEmbeddings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert model.store is not None
    words = ["--home", model.store.root, "--data-type", "int8", "--format", "safetensors", "-e", "item"]
    assert run_arguments(["vectors", str(tmp_path / "out"), *words]) == 0
    shown = capsys.readouterr().out
    assert "item.safetensors" in shown and "data_type int8, dimension 8, bytes_per_vector 12, recall@10 " in shown


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
