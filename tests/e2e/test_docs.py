"""The documentation is whole: the site builds without a network, generated pages are current, named code is there."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ENGINE = ROOT / "twhin_pipeline"
# What makes the build reach for the network, if it tries: nothing answers there.
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as by `make docs`: a broken link or a page that is not in the menu ends the build."""
    folder = tmp_path_factory.mktemp("site")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), UNREACHABLE)
    env = {**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site(site):
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}


def test_a_page_loads_nothing_from_elsewhere(site):
    loads = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'> ]+""")
    elsewhere = {str(page): found for page in site.rglob("*.html") if (found := loads.findall(page.read_text()))}
    assert not elsewhere
    imported = re.compile(r"""url\(["']?(?:https?:)?//|@import ["'](?:https?:)?//""")
    assert not [str(sheet) for sheet in site.rglob("*.css") if imported.search(sheet.read_text())]


def test_python_functions_are_shown_with_their_arguments(site):
    page = re.sub(r"<[^>]*>", "", (site / "reference" / "python.html").read_text())
    for name in ("load_model(", "predict_relation(", "recommend(", "neighbors(", "load_config("):
        assert name in page
    assert "Raises:" in page


def test_the_command_line_page_is_current():
    command = [sys.executable, str(ROOT / "scripts" / "command_line_page.py")]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made.count("\n### twhin ") > 20
    page = (DOCS / "reference" / "command-line.md").read_text()
    assert page == made, "docs/reference/command-line.md is not current; run `make reference`"


def folder_rows() -> list[tuple[str, str]]:
    """Return the first and the last column of the table of folders inside `twhin_pipeline/`."""
    text = (DOCS / "explanation" / "architecture.md").read_text()
    section = text.split("### Inside `twhin_pipeline/`")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return [(row[0], row[-1]) for row in rows]


def test_the_architecture_page_names_every_folder_in_its_order():
    order = runpy.run_path(str(ROOT / "tests" / "test_architecture.py"))["ORDER"]
    named = [name for first, _ in folder_rows() for name in re.findall(r"`(\w+)/`", first)]
    assert named == [folder for folder in order if (ENGINE / folder).is_dir()]


@pytest.mark.parametrize(("first", "modules"), folder_rows(), ids=[first for first, _ in folder_rows()])
def test_modules_that_the_architecture_page_names_are_there(first, modules):
    if "/`" in first:
        folder = ENGINE / re.findall(r"`(\w+)/`", first)[0]
        for name in re.findall(r"`([a-z_]+/?)`", re.sub(r"\(.*?\)", "", modules)):
            assert (folder / name).is_dir() or (folder / f"{name}.py").is_file(), f"{folder.name}/{name}"
    else:
        assert all((ENGINE / name).is_file() for name in re.findall(r"`(\w+\.py)`", first))


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_files_that_a_page_names_are_there(page):
    folders = "configs|benchmarks|examples|tests|assets|resources|scripts|packaging"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)", page.read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_links_of_pages_in_the_root_are_valid():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text()):
            assert target.startswith("http") or (ROOT / target).exists(), f"{name}: {target}"
