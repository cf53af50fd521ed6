"""What is read from elsewhere ends within a limit, and what cannot be read is one clear line."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_files import SNAPSHOT, make_config, store_at, triples, write

from twhin_pipeline import remote
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.graph import raw_edges

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/csv\r\nContent-Length: 1000\r\n\r\n"
ANSWERS = {
    "/silent.csv": b"",  # no answer at all
    "/slow.csv": HEAD + b"lhs,rel,rhs\n",  # and then nothing more
    "/short.csv": HEAD + b"lhs,rel,rhs\na,fav,x\n",  # and then the end
    "/error.csv": b"HTTP/1.1 500 Odd\r\nContent-Length: 0\r\n\r\n",
    "/missing.csv": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "/noise.csv": b"no protocol that anyone knows\r\n\r\n",
}


@pytest.fixture
def server() -> Iterator[str]:
    """A server whose answers are bad in the ways of `ANSWERS`."""
    listening = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            held.append(connection)
            asked = connection.recv(65536).decode(errors="replace").split(" ")
            path = asked[1] if len(asked) > 1 else ""
            answer = ANSWERS.get(path, b"")
            if asked[0] == "HEAD" and answer.startswith(HEAD):
                answer = HEAD
            connection.sendall(answer)
            if asked[0] == "HEAD" or path not in ("/silent.csv", "/slow.csv"):
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()
    for connection in held:
        connection.close()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/silent.csv", "no answer for 0.5 s|Server disconnected"),
        ("/slow.csv", "no answer for 0.5 s"),
        ("/short.csv", "not completed|payload"),
        ("/error.csv", "500"),
        ("/missing.csv", "no file for snapshot"),
        ("/noise.csv", "cannot be read"),
    ],
)
def test_a_server_that_answers_badly_is_one_clear_error_within_the_limit(tmp_path, server, monkeypatch, path, told):
    monkeypatch.setattr(remote, "STALL_S", 0.5)
    with pytest.raises(UserError, match=told) as caught:
        raw_edges.ingest(make_config(server + path), store_at(tmp_path), SNAPSHOT)
    assert path in str(caught.value) and len(str(caught.value).splitlines()) == 1
    may_pass = isinstance(caught.value, UnavailableError)
    assert may_pass is (path in ("/silent.csv", "/slow.csv", "/short.csv", "/error.csv")), (
        "who tries again goes by this"
    )
    assert not list((tmp_path / "home").rglob("*.parquet")), "nothing is half-written"


@pytest.mark.parametrize(
    "url",
    [
        "http://a..b/e.csv", "http://[::1/e.csv", "http://127.0.0.1:1/e.csv", "http://127.0.0.1:1/*.csv",
        "http://127.0.0.1:1/e.parquet", "http://127.0.0.1:99999/e.csv", "nowhere://x/e.csv",
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_is_one_clear_error(tmp_path, url):
    with pytest.raises(UserError) as caught:
        raw_edges.ingest(make_config(url), store_at(tmp_path), SNAPSHOT)
    assert url in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("prefix", ["", "file://", "local://"])
def test_a_named_pipe_or_device_is_not_waited_for(tmp_path, prefix):
    os.mkfifo(tmp_path / "pipe.csv")
    for name, told in ((tmp_path / "pipe.csv", "is a named pipe"), (Path("/dev/zero"), "is a device")):
        config = make_config(f"{prefix}{name}", source={"format": "csv"})
        with pytest.raises(UserError, match=f"{told}; copy what it gives to a file"):
            raw_edges.ingest(config, store_at(tmp_path), SNAPSHOT)


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_a_url_of_a_local_file_is_that_file(tmp_path, ending):
    write(tmp_path / "e.parquet", [("a", "fav", "x")])
    (tmp_path / "e.csv").write_text("lhs,rel,rhs\na,fav,x\n")
    for number, path in enumerate((f"file://{tmp_path}/e.{ending}", f"file://{tmp_path}/*.{ending}")):
        store = store_at(tmp_path / str(number))
        raw_edges.ingest(make_config(path), store, SNAPSHOT)
        assert triples(store) == {("a", "fav", "x")}


def test_a_file_that_the_system_makes_as_it_is_read_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"/proc/self/maps: has no column 'lhs'"):
        raw_edges.ingest(make_config("/proc/self/maps", source={"format": "csv"}), store_at(tmp_path), SNAPSHOT)


def test_a_file_whose_name_is_no_text_is_one_clear_error(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.csv"
    with open(name, "wb") as file:
        file.write(b"lhs,rel,rhs\na,fav,x\n")
    with pytest.raises(UserError, match=r"its name is no UTF-8 text; rename it") as caught:
        raw_edges.ingest(make_config(tmp_path / "*.csv"), store_at(tmp_path), SNAPSHOT)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("e.parquet", b"not parquet at all", "it is no Parquet file, or the end of one is missing: copy or write"),
        ("e.parquet", b"", "it is no Parquet file, or the end of one is missing"),
        ("e.csv.gz", b"no gzip", r"cannot be read \(.*correct the path, or make the file anew"),
        ("e.csv.zst", b"no zstd", r"cannot be read \(.*correct the path, or make the file anew"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        raw_edges.ingest(make_config(tmp_path / name), store_at(tmp_path), SNAPSHOT)
    assert name in str(caught.value) and "said?" not in str(caught.value)


def test_damage_within_a_parquet_file_is_named_with_what_to_do(tmp_path):
    path = write(tmp_path / "e.parquet", [(f"u{n}", "fav", "x") for n in range(1000)])
    content = path.read_bytes()
    path.write_bytes(content[:40] + b"\xff" * 20 + content[60:])
    with pytest.raises(UserError, match=r"cannot be read .*it is damaged, or of another format than its name says"):
        raw_edges.ingest(make_config(path), store_at(tmp_path), SNAPSHOT)
