"""Text files line by line: every line is an edge or is counted as lost, under the number that it has in its file."""

from __future__ import annotations

import csv
import gzip
import io
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edge_files import SNAPSHOT, make_config, rows_of, store_at, triples

from twhin_pipeline.checks import checks
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import delimited, raw_edges, scan
from twhin_pipeline.store import Manifest, Store, database

HEADER = "lhs,rel,rhs"


def ingest(tmp_path: Path, text: str | bytes, name: str = "e.csv", **source: object) -> tuple[Store, Manifest]:
    """Ingest one file of this text."""
    content = text.encode() if isinstance(text, str) else text
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = pa.Codec("zstd").compress(content, asbytes=True)
    (tmp_path / name).write_bytes(content)
    store = store_at(tmp_path)
    return store, raw_edges.ingest(make_config(tmp_path / name, source=source), store, SNAPSHOT)


def rejected(store: Store) -> list[tuple[str, int]]:
    """Return reason and row of what was rejected."""
    return [(row["reason"], row["row"]) for row in rows_of(store, "raw_edges_rejected")]


def edges(number: int, first: int = 0) -> list[str]:
    return [f"u{i},fav,x{i % 9}" for i in range(first, first + number)]


@pytest.mark.parametrize("name", ["e.csv", "e.csv.gz", "e.csv.zst"])
@pytest.mark.parametrize("opened", ['"u250,fav,x', 'u250,"fav,x', 'u250,fav,"x'])
def test_a_quotation_mark_that_is_never_closed_loses_no_row_silently(tmp_path, name, opened):
    """50 of 300 rows: they once counted as one rejected row, below the accepted share."""
    text = "\n".join([HEADER, *edges(250), opened, *edges(49, 251)]) + "\n"
    store, manifest = ingest(tmp_path, text, name)
    details = manifest.details
    assert details["read"] == 300 and details["kept"] == 250
    assert details["rejected_by_reason"] == {"unclosed quotation mark": 50}
    assert rejected(store) == [("unclosed quotation mark", line) for line in range(252, 302)]
    first, second = rows_of(store, "raw_edges_rejected")[:2]
    assert first["rhs"] == opened and first["value"] == second["value"] == "lines 252 to 301"
    config = make_config(tmp_path / name)
    result = checks.run("edges_rejected_share", config, store, SNAPSHOT)
    assert not result.passed and result.offending is not None
    assert result.offending.to_pylist()[0]["row"] == 252, "the check names the line in which it begins"


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ('u100,fav,"x', 'u120,fav,x"'),  # what is between is a value, as the standard has it
        ('u100,fav,"x', '"u120",fav,x'),  # what follows the second quotation mark is in its way
        ('"u100,fav,x', 'u120",fav,x'),
        ('u100,fav,"x', 'u120,fav,"x"'),
    ],
)
def test_a_quotation_mark_that_a_later_one_closes_by_chance_loses_no_row_silently(tmp_path, begin, end):
    text = "\n".join([HEADER, *edges(100), begin, *edges(19, 101), end, *edges(80, 121), "odd"])
    store, manifest = ingest(tmp_path, text)
    assert manifest.details["read"] == 202 and manifest.details["kept"] == 180
    lost = [("unclosed quotation mark", line) for line in range(102, 123)]
    assert rejected(store) == [*lost, ("malformed line", 203)]


def test_a_quotation_mark_in_the_header_that_is_never_closed_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"e\.csv: line 1 has a quotation mark that is never closed"):
        ingest(tmp_path, "\n".join(['lhs,rel,rhs,"note', *(f"{edge}," for edge in edges(9))]))


def test_texts_of_several_lines_and_blank_lines_are_no_loss_and_lines_after_them_keep_their_number(tmp_path):
    text = (
        f"{HEADER},note\n"
        'a,fav,x,"one\ntwo, and ""three"""\n'  # lines 2 and 3
        "\n"
        "a,likes,x,n\n"  # 5
        'b,fav,"x\ny",n\n'  # 6 and 7
        "\n\n"
        "b,fav\n"  # 10
        'c,likes,x,"\n\n"\n'  # 11 to 13
        "d,likes,x,n\n\n"  # 14
    )
    store, manifest = ingest(tmp_path, text)
    assert triples(store) == {("a", "fav", "x"), ("b", "fav", "x\ny")}
    assert rejected(store) == [
        ("unknown relation", 5), ("malformed line", 10), ("unknown relation", 11), ("unknown relation", 14)
    ]  # fmt: skip
    assert manifest.details["read"] == 6


@pytest.mark.parametrize(
    "ends",
    [("\r\n", "\n", "\r\n"), ("\n", "\r\n", "\n"), ("\r\n", "\r\n", "\n"), ("\n", "\n\r\n", "\n")],
)
def test_lines_that_end_in_different_ways_are_read(tmp_path, ends):
    text = "".join(line + end for line, end in zip([HEADER, "a,fav,x", "b,fav,y"], ends, strict=True)) + "c,likes,z"
    store, _ = ingest(tmp_path, text)
    assert triples(store) == {("a", "fav", "x"), ("b", "fav", "y")}
    assert rejected(store) == [("unknown relation", 5 if "\n\r\n" in ends else 4)]


def test_a_carriage_return_amid_a_line_is_one_clear_error_that_names_the_line(tmp_path):
    with pytest.raises(UserError, match=r"e\.csv: line 3 has a carriage return within it.*end all lines alike") as told:
        ingest(tmp_path, f"{HEADER}\r\na,fav,x\r\nb,fav,y\rc,fav,z\r\n")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("text", [b"a" * (2 << 20), b"lhs,rel,rhs," + b"n" * (2 << 20) + b"\na,fav,x\n"])
def test_a_header_without_an_end_is_one_clear_error(tmp_path, text):
    with pytest.raises(UserError, match=r"e\.csv: line 1 is longer than 1,048,576 bytes"):
        ingest(tmp_path, text)


def test_thousands_of_small_files_are_read_together_and_named_apart(tmp_path):
    """10,000 CSV files once took six minutes: a reading of its own for each."""
    odd = {17: "\nodd,fav", 700: "\na,likes,x", 999: '\n"a,fav,x\nb,fav,y', 5: '\n"a\nb",likes,x'}
    for number in range(1000):
        text = f"{HEADER}\nu{number},fav,x{odd.get(number, '')}" + ("\n" if number % 2 else "")
        (tmp_path / f"{number:05}.csv").write_text(text.replace("\n", "\r\n") if number == 8 else text)
    store = store_at(tmp_path)
    started = time.process_time()
    manifest = raw_edges.ingest(make_config(tmp_path / "*.csv"), store, SNAPSHOT)
    assert triples(store) == {(f"u{number}", "fav", "x") for number in range(1000)}
    assert len(manifest.details["files"]) == 1000
    found = [(Path(row["file"]).name, row["row"], row["reason"]) for row in rows_of(store, "raw_edges_rejected")]
    assert found == [
        ("00005.csv", 3, "unknown relation"),
        ("00017.csv", 3, "malformed line"),
        ("00700.csv", 3, "unknown relation"),
        ("00999.csv", 3, "unclosed quotation mark"),
        ("00999.csv", 4, "unclosed quotation mark"),
    ]
    # One reading of each file takes 40 ms and more: 40 s.
    assert time.process_time() - started < 20


def test_thousands_of_small_parquet_files_are_described_once_for_each_schema(tmp_path, monkeypatch):
    for number in range(40):
        columns = {"lhs": [number], "rel": ["fav"], "rhs": ["x"]} | ({"more": [1]} if number % 2 else {})
        pq.write_table(pa.table(columns), tmp_path / f"{number:05}.parquet")
    asked = []
    parquet = scan.parquet
    monkeypatch.setattr(scan, "parquet", lambda files, numbered=True: asked.append(files) or parquet(files, numbered))
    store = store_at(tmp_path)
    raw_edges.ingest(make_config(tmp_path / "*.parquet"), store, SNAPSHOT)
    assert len(triples(store)) == 40 and len([files for files in asked if len(files) == 1]) == 2


# Beside the standard library


def written(rng: random.Random, quoted: bool) -> tuple[str, bool]:
    """Return a file with quotes, blank lines, lines of another width, texts of several lines; and whether it has a
    quotation mark too many.
    """
    out = io.StringIO()
    out.write(f"{HEADER}\n")
    writer = csv.writer(out, lineterminator="\n", quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    values = ["a", "b,c", 'say "x"', "", "d"] + (["e\nf", "\n", 'g"\n"'] if quoted else [])
    for number in range(rng.randrange(1, 40)):
        row = [f"u{number}", "fav", rng.choice(values)]
        kind = rng.random()
        if kind < 0.1:
            out.write("\n")
        elif kind < 0.2:
            row = row[:2] if rng.random() < 0.5 else [*row, "more"]
        writer.writerow(row)
    text = out.getvalue()
    if damaged := rng.random() < 0.4:
        at = rng.randrange(len(HEADER) + 1, len(text))
        text = text[:at] + '"' + text[at:]
    return text.removesuffix("\n") if rng.random() < 0.3 else text, damaged


def test_every_line_of_any_file_is_accounted_for_and_rows_are_those_of_the_standard_library(tmp_path):
    rng = random.Random(7)
    con = database.connect()
    path, swallowed = tmp_path / "e.csv", 0
    for number in range(200):
        text, damaged = written(rng, quoted=number % 3 > 0)
        path.write_text(text)
        names = HEADER.split(",")
        (staged,) = delimited.stage(con, [("e", str(path))], ",", f"{tmp_path}/s", names, names)
        table = pq.read_table(staged.path)
        rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
        shifts = dict(zip(*(each.tolist() for each in staged.shifts), strict=True))
        lost = {one.line + n for one in staged.malformed for n in range(one.lines)}
        known, extra = {1}, 0
        for row, values in enumerate(rows):
            extra = shifts.get(row, extra)
            line, height = row + 2 + extra, 1 + sum((value or "").count("\n") for value in values)
            # A row's first line has its first value, so it is where it is said to be.
            assert text.split("\n")[line - 1].lstrip('"').startswith(values[0].split("\n")[0]), text
            known |= set(range(line, line + height))
        every = {n for n, line in enumerate(text.split("\n"), 1) if line}
        assert not known & lost and every - known - lost == set(), text
        sound = [tuple(record) for record in csv.reader(io.StringIO(text)) if len(record) == 3][1:]
        assert set(rows) <= set(sound) if damaged else rows == sound, text
        swallowed += any(one.reason == delimited.UNCLOSED for one in staged.malformed)
    assert swallowed > 10
