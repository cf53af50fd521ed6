"""What draws the explorer's map is fetched at set-up in exact versions, and set-up goes on where it cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from wheels import ROOT

SCRIPT, FOLDER = ROOT / "packaging" / "explorer.sh", ROOT / "packaging" / "explorer"
BUNDLE = Path("twhin_pipeline", "serving", "explorer", "static", "vendor", "scatterplot.js")


def run(folder: Path, npm: str | None) -> subprocess.CompletedProcess[str]:
    """Run the script in a copy of its files, where `npm` is a program with this text, or missing."""
    packaging, tools = folder / "packaging", folder / "bin"
    (packaging / "explorer").mkdir(parents=True)
    shutil.copy(SCRIPT, packaging)
    for name in ("package.json", "scatterplot.js"):
        shutil.copy(FOLDER / name, packaging / "explorer")
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "cat", "touch", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    if npm is not None:
        (tools / "npm").write_text(f"#!{shutil.which('bash')}\n{npm}\n")
        (tools / "npm").chmod(0o755)
    env = {**os.environ, "PATH": str(tools)}
    return subprocess.run(
        [str(tools / "bash"), str(packaging / "explorer.sh")], env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize(("npm", "words"), [(None, "npm is not installed"), ("exit 1", "npm could not install")])
def test_without_npm_or_its_registry_set_up_goes_on_and_says_what_is_left_out(tmp_path, npm, words):
    done = run(tmp_path, npm)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout.splitlines()[-1] and "map page" in done.stdout
    assert not (tmp_path / BUNDLE).exists()


def test_with_npm_there_is_a_bundle_with_the_licenses_of_what_is_in_it_and_it_is_not_made_again(tmp_path):
    install = (
        "mkdir -p node_modules/.bin node_modules/axe-core node_modules/regl node_modules/@flekschas/utils\n"
        "printf 'free to use' > node_modules/regl/LICENSE\n"
        "printf '#!/bin/sh\\necho made > ../../twhin_pipeline/serving/explorer/static/vendor/scatterplot.js\\n' "
        "> node_modules/.bin/esbuild\n/bin/chmod 755 node_modules/.bin/esbuild"
    )
    done = run(tmp_path, install)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / BUNDLE).read_text() == "made\n"
    licenses = (tmp_path / BUNDLE).with_name("LICENSES.txt").read_text()
    assert "== regl/" in licenses and "free to use" in licenses
    again = subprocess.run([str(tmp_path / "packaging" / "explorer.sh")], capture_output=True, text=True)
    assert again.stdout == "the bundle is there\n"


def test_versions_are_exact_and_git_has_neither_a_lock_nor_what_was_fetched():
    listed = json.loads((FOLDER / "package.json").read_text())
    versions = listed["dependencies"] | listed["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/packaging/explorer/node_modules/", f"/{BUNDLE.parent}/"} <= set(ignored)
    assert not list(FOLDER.glob("*lock*"))
