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
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import browser
import pytest
from dagster_home import BIN, ROOT, SNAPSHOT, Home, end, graph
from patience import wait_for

from twhin_pipeline.store import Store, releases

ARGUMENTS = [*browser.ARGUMENTS, "--disable-gpu"]
SCREENSHOT = os.environ.get("TWHIN_UI_SCREENSHOT")
SELECTION = "*" if SCREENSHOT else 'group:"edges" or group:"vocabulary"'


@pytest.fixture(scope="module")
def chromium() -> str:
    return browser.chromium()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("ui"))


@contextmanager
def serving(home: Home) -> Iterator[str]:
    """Start Dagster's webserver and daemon on a free port of the loopback, as `make ui` does, and yield the address."""
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
def server(home, chromium) -> Iterator[str]:
    with serving(home) as url:
        yield url


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


def runs(server: str) -> list[dict[str, Any]]:
    """Ask Dagster for its runs, the newest first."""
    fields = "runId status startTime endTime tags {key value}"
    query = json.dumps({"query": f"{{runsOrError {{... on Runs {{results {{{fields}}}}}}}}}"}).encode()
    request = urllib.request.Request(f"{server}/graphql", query, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)["data"]["runsOrError"]["results"]


@pytest.fixture(scope="module")
def drawn(page, server) -> str:
    """The address of the asset graph with all groups unfolded; the keys fold them again, the address does not."""
    page.goto(f"{server}/asset-groups?asset-selection={quote(SELECTION)}")
    page.get_by_text("vocabulary", exact=True).first.wait_for()
    page.keyboard.press("Alt+e")
    page.wait_for_url("**expanded=**")
    return page.url


def open_graph(page, drawn: str) -> None:
    """Open the asset graph and wait until it is drawn."""
    page.goto(drawn)
    page.get_by_text("raw_edges_rejected").locator("visible=true").first.wait_for()


def test_the_asset_graph_is_drawn(page, drawn):
    open_graph(page, drawn)
    for name in ("raw_edges", "raw_edges_rejected", "user", "item"):
        assert page.locator(f"svg >> text={name}").or_(page.get_by_text(name, exact=True)).count() > 0, name


def test_a_materialization_launched_from_the_page_succeeds(page, server, drawn, home):
    open_graph(page, drawn)
    page.get_by_role("button", name="Materialize all").first.click()
    page.get_by_text("Select a partition").click()
    page.get_by_text(SNAPSHOT, exact=True).locator("visible=true").first.click()
    page.get_by_text("Launch runs to materialize").click()  # closes the list of partitions
    page.get_by_role("button", name="Launch 1 run").click()
    wait_for(lambda: [r for r in runs(server) if r["status"] in ("SUCCESS", "FAILURE", "CANCELED")], 240, "a run ended")
    assert [run["status"] for run in runs(server)] == ["SUCCESS"], (home.folder / "dev.log").read_text()[-6_000:]
    assert Store(str(home.store)).exists("vocabulary/user", SNAPSHOT)
    open_graph(page, drawn)
    page.wait_for_timeout(2_000)  # until it has moved into place
    if SCREENSHOT:
        page.set_viewport_size({"width": 1300, "height": 1000})
        page.get_by_text("Hide navigation").click()
        open_graph(page, drawn)
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


@pytest.mark.long
@pytest.mark.timeout(1_800)
def test_a_backfill_launched_from_the_page_runs_the_chain_of_each_snapshot_oldest_first(page, tmp_path: Path):
    """The older snapshot arrives after the newer one: Dagster runs partitions in the order in which it knows them."""
    days = ["2024-12-31", SNAPSHOT]
    small = {"training": {"num_epochs": 2, "refit": False}, "launch": {"nproc_per_node": 1}}
    home = Home(tmp_path, **small, evaluation={"baselines": []})
    with serving(home) as url:
        graph(tmp_path / f"edges-{days[0]}.parquet", seed=1)
        page.goto(f"{url}/asset-groups?asset-selection={quote('*')}")
        wait_for(lambda: set(days) <= set(partitions(url)), 180, "the sensor adds the snapshot")
        page.reload()
        page.get_by_role("button", name="Materialize all").first.click()
        page.get_by_role("button", name="All", exact=True).click()
        page.get_by_text("2 partitions", exact=True).wait_for()
        page.get_by_role("button", name="Launch backfill").click()
        wait_for(lambda: len(ended(url)) == len(days), 600, "both runs ended")
        page.goto(f"{url}/runs?view=backfills")
        page.get_by_text("Success", exact=True).first.wait_for()
        found = sorted(ended(url), key=lambda run: run["startTime"])
    told = (tmp_path / "dev.log").read_text()[-6_000:]
    assert [run["status"] for run in found] == ["SUCCESS"] * 2, told
    assert [partition_of(run) for run in found] == days
    assert found[0]["endTime"] <= found[1]["startTime"], "one after another"
    store = Store(str(home.store))
    assert [name.rpartition("-")[0] for name in sorted(releases.names(store))] == days
    assert store.manifest("vocabulary/user", days[1]).details["earlier_snapshot"] == days[0]
    assert store.manifest("drift", days[1]).details["compared_with"] == min(releases.names(store))


def partition_of(run: dict[str, Any]) -> str:
    return next(tag["value"] for tag in run["tags"] if tag["key"] == "dagster/partition")


def ended(server: str) -> list[dict[str, Any]]:
    return [run for run in runs(server) if run["status"] in ("SUCCESS", "FAILURE", "CANCELED")]


def partitions(server: str) -> list[str]:
    """Ask Dagster for the snapshots that it knows, in its order."""
    query = json.dumps({"query": '{assetNodes(assetKeys: [{path: ["raw_edges"]}]) {partitionKeys}}'}).encode()
    request = urllib.request.Request(f"{server}/graphql", query, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)["data"]["assetNodes"][0]["partitionKeys"]
