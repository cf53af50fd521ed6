"""The UI in a headless Chromium: the asset graph is drawn, and a materialization launched from the page succeeds.

`TWHIN_UI_SCREENSHOT=docs/ui.png` makes the test launch the whole chain and keep a picture of the page.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote

import browser
import pytest
from dagster_home import BIN, ROOT, SNAPSHOT, Home, end
from patience import wait_for

from twhin_pipeline.store import Store

ARGUMENTS = [*browser.ARGUMENTS, "--disable-gpu"]
SCREENSHOT = os.environ.get("TWHIN_UI_SCREENSHOT")
SELECTION = "*" if SCREENSHOT else 'group:"edges" or group:"vocabulary"'


@pytest.fixture(scope="module")
def chromium() -> str:
    return browser.chromium()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("ui"))


@pytest.fixture(scope="module")
def server(home, chromium) -> Iterator[str]:
    """Dagster's webserver and daemon on a free port of the loopback, as `make ui` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(BIN / "dagster"), "dev", "-h", "127.0.0.1", "-p", str(port), "-m", "twhin_pipeline.definitions"]
    log = home.folder / "dev.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=home.env, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-4_000:]
        try:
            with urllib.request.urlopen(f"{url}/server_info", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    try:
        wait_for(answers, 90, "the webserver answers")
        yield url
    finally:
        end(process)


@pytest.fixture(scope="module")
def page(server, chromium, home):
    """A page of the browser, no other one than ours."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened_browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        opened = opened_browser.new_page(viewport={"width": 1600, "height": 860})
        opened.set_default_timeout(40_000)
        yield opened
        opened.screenshot(path=str(home.folder / "last.png"))  # what a failed test saw
        opened_browser.close()


def runs(server: str) -> list[dict[str, str]]:
    """Ask Dagster for its runs."""
    query = json.dumps({"query": "{runsOrError {... on Runs {results {runId status}}}}"}).encode()
    request = urllib.request.Request(f"{server}/graphql", query, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)["data"]["runsOrError"]["results"]


@pytest.fixture(scope="module")
def graph(page, server) -> str:
    """The address of the asset graph with all groups unfolded; the keys fold them again, the address does not."""
    page.goto(f"{server}/asset-groups?asset-selection={quote(SELECTION)}")
    page.get_by_text("vocabulary", exact=True).first.wait_for()
    page.keyboard.press("Alt+e")
    page.wait_for_url("**expanded=**")
    return page.url


def open_graph(page, graph: str) -> None:
    """Open the asset graph and wait until it is drawn."""
    page.goto(graph)
    page.get_by_text("raw_edges_rejected").locator("visible=true").first.wait_for()


def test_the_asset_graph_is_drawn(page, graph):
    open_graph(page, graph)
    for name in ("raw_edges", "raw_edges_rejected", "user", "item"):
        assert page.locator(f"svg >> text={name}").or_(page.get_by_text(name, exact=True)).count() > 0, name


def test_a_materialization_launched_from_the_page_succeeds(page, server, graph, home):
    open_graph(page, graph)
    page.get_by_role("button", name="Materialize all").first.click()
    page.get_by_text("Select a partition").click()
    page.get_by_text(SNAPSHOT, exact=True).locator("visible=true").first.click()
    page.get_by_text("Launch runs to materialize").click()  # closes the list of partitions
    page.get_by_role("button", name="Launch 1 run").click()
    wait_for(lambda: [r for r in runs(server) if r["status"] in ("SUCCESS", "FAILURE", "CANCELED")], 240, "a run ended")
    assert [run["status"] for run in runs(server)] == ["SUCCESS"], (home.folder / "dev.log").read_text()[-6_000:]
    assert Store(str(home.store)).exists("vocabulary/user", SNAPSHOT)
    open_graph(page, graph)
    page.wait_for_timeout(2_000)  # until it has moved into place
    if SCREENSHOT:
        page.set_viewport_size({"width": 1300, "height": 1000})
        page.get_by_text("Hide navigation").click()
        open_graph(page, graph)
        page.wait_for_timeout(2_000)
        page.screenshot(path=str(ROOT / SCREENSHOT), clip={"x": 0, "y": 0, "width": 1300, "height": 840})


def test_an_assets_page_shows_what_was_made(page, server):
    page.goto(f"{server}/assets/vocabulary/user")
    for text in ("Each user's row of its table", "first_snapshot", "largest_degree", "degrees"):
        page.get_by_text(text).first.wait_for()
    picture = page.locator("img[src^='data:image/svg']").first
    picture.wait_for()
    assert picture.evaluate("image => image.naturalWidth") > 300
    page.get_by_text("/_pictures/degrees.png").first.wait_for()


def test_checks_can_be_executed_from_their_page(page, server):
    """Without a partition chosen: they look at the newest snapshot."""
    before = len(runs(server))
    page.goto(f"{server}/assets/raw_edges?view=checks")
    page.get_by_role("button", name="Execute all").click()
    wait_for(lambda: len(runs(server)) > before, 30, "a run of the checks")
    wait_for(lambda: all(run["status"] in ("SUCCESS", "FAILURE") for run in runs(server)), 120, "it ended")
    assert {run["status"] for run in runs(server)} == {"SUCCESS"}
