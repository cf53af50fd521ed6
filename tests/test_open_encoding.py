"""Text is UTF-8 whatever the locale says: files that are read and written, and what is printed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("twhin_pipeline", "assets", "resources", "scripts")
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""An environment in which Python takes text for ASCII."""


def without_encoding(path: Path) -> list[int]:
    """Return the lines that open a text file, or run a program and read its text, by the locale's encoding."""
    found = []
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    # What `json.dumps` writes is ASCII.
    ascii = {id(call.args[0]) for call in calls if ast.unparse(call.func) == "json.loads"}
    ascii |= {id(call) for call in calls if call.args and ast.unparse(call.args[0]).startswith("json.dumps(")}
    for node in calls:
        if id(node) in ascii:
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {keyword.arg for keyword in node.keywords}
        modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        modes += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        is_text = name in ("read_text", "write_text") and not _of_ours(node)
        binary = any("b" in str(mode) for mode in modes) or any('"' in part and "b" in part for part in chosen(node))
        is_text |= name == "open" and isinstance(node.func, ast.Name) and not binary
        is_text |= name in ("run", "Popen", "check_output") and "text" in given
        positional = len(node.args) >= {"read_text": 1, "write_text": 2}.get(name, 99)
        if is_text and "encoding" not in given and not positional:
            found.append(node.lineno)
    return found


def chosen(node: ast.Call) -> list[str]:
    """Return the source of a mode that is chosen among two."""
    return [ast.unparse(each).replace("'", '"') for each in node.args[1:2] if isinstance(each, ast.IfExp)]


def _of_ours(node: ast.Call) -> bool:
    """Tell whether a method is the store's, which has no encoding to choose."""
    value = getattr(node.func, "value", None)
    return getattr(value, "attr", getattr(value, "id", "")) in ("store", "self")


def test_every_text_file_is_opened_as_utf_8():
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in without_encoding(path)]
    assert len(files) > 150 and found == []


@pytest.mark.parametrize("arguments", [["config", "--reference"], ["config", "--schema"], ["--help"]])
def test_a_command_prints_utf_8_in_a_plain_locale(arguments):
    command = [sys.executable, "-m", "twhin_pipeline.cli", *arguments]
    done = subprocess.run(command, env={**os.environ, **PLAIN}, capture_output=True)
    usual = subprocess.run(command, env={**os.environ, "PYTHONUTF8": "1"}, capture_output=True, check=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == usual.stdout


def test_a_chain_of_stages_and_a_query_keep_every_letter_in_a_plain_locale(tmp_path):
    (tmp_path / "é.csv").write_text("lhs,rel,rhs\nü,fav,é\nä,fav,x\n", encoding="utf-8")
    tables = "[{name: user, embedding_dim: 4}, {name: item}]"
    (tmp_path / "ö.yaml").write_text(
        f"source: {{path: é.csv}}  # ß\nmodel:\n  embeddings: {{tables: {tables}}}\n"
        "  relations: [{name: fav, lhs: user, rhs: item}]\n",
        encoding="utf-8",
    )
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(ROOT)}

    def twhin(*arguments: str) -> bytes:
        command = [sys.executable, "-m", "twhin_pipeline.cli", *arguments, "--home", "hömé"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    twhin("ingest", "--config", "ö.yaml", "--snapshot", "2030-01-01")
    twhin("vocabulary", "--config", "ö.yaml", "--snapshot", "2030-01-01")
    shown = twhin("sql", "--csv", "SELECT lhs, rhs FROM raw_edges ORDER BY rhs").decode()
    assert [line.replace('"', "") for line in shown.splitlines()[1:]] == ["ä,x", "ü,é"]
