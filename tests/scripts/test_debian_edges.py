"""The script that makes the bundled graph, on a small index."""

from __future__ import annotations

import importlib.util
import lzma
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "debian_edges.py"
INDEX = """\
Package: zsh
Maintainer: "Zsh Team" <zsh@example.org>
Depends: libc6 (>= 2.38), zsh-common (= 5.9-8) | zsh-data, libcap2:any, zsh
Pre-Depends: dpkg (>= 1.15)
Recommends: libc6
Suggests: zsh-doc, virtual-shell
Section: contrib/shells
Tag: interface::{commandline,text-mode}, role::program,
 implemented-in::c

Package: libc6
Maintainer: Libc People <libc@example.org>
Section: libs
Enhances: zsh
Description: a library
 with a longer text, Depends: nothing

Package: zsh-common
Maintainer: Zsh Team <other@example.org>

Package: zsh-data

Package: zsh-doc

Package: dpkg
"""
EDGES = [
    ("dpkg", "in_section", "admin"),
    ("libc6", "enhances", "zsh"),
    ("libc6", "in_section", "libs"),
    ("libc6", "maintained_by", "Libc People"),
    ("zsh", "depends", "dpkg"),
    ("zsh", "depends", "libc6"),
    ("zsh", "depends", "zsh-common"),
    ("zsh", "depends", "zsh-data"),
    ("zsh", "in_section", "shells"),
    ("zsh", "maintained_by", "Zsh Team"),
    ("zsh", "recommends", "libc6"),
    ("zsh", "suggests", "zsh-doc"),
    ("zsh", "tagged", "implemented-in::c"),
    ("zsh", "tagged", "interface::commandline"),
    ("zsh", "tagged", "interface::text-mode"),
    ("zsh", "tagged", "role::program"),
    ("zsh-common", "maintained_by", "Zsh Team"),
]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("debian_edges", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("packed", [False, True])
def test_an_index_becomes_its_edges(script, tmp_path, packed):
    text = INDEX + "Section: admin\n"
    index = tmp_path / ("Packages.xz" if packed else "Packages")
    index.write_bytes(lzma.compress(text.encode()) if packed else text.encode())
    assert script.main([str(index), "--output", f"{tmp_path}/e.parquet"]) == 0
    table = pq.read_table(tmp_path / "e.parquet")
    assert [tuple(row.values()) for row in table.to_pylist()] == EDGES


def test_what_is_no_index_is_one_clear_error(script, tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    assert script.main([f"{tmp_path}/empty", "--output", f"{tmp_path}/e.parquet"]) == 2
    assert script.main([f"{tmp_path}/none", "--output", f"{tmp_path}/e.parquet"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "no package found" in told[0] and "cannot be read" in told[1] and len(told) == 2
