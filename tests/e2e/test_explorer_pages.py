"""The explorer in a headless Chromium: people find an entity and see why something is recommended, by mouse or by keys.

`TWHIN_EXPLORER_SCREENSHOTS=FOLDER` keeps a picture of each page, in light and dark.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import browser
import days
import pytest
import small_store
import uvicorn
from dagster_home import ROOT
from patience import wait_for

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.serving.app import create_app
from twhin_pipeline.serving.explorer import router
from twhin_pipeline.serving.options import ServeOptions
from twhin_pipeline.store import Store
from twhin_pipeline.views import entity_map

AXE = ROOT / "packaging" / "explorer" / "node_modules" / "axe-core" / "axe.min.js"
BUNDLE = router.STATIC / "vendor" / "scatterplot.js"
WEBGL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
ODD = "<img src=x onerror=\"document.title='broken'\">"
"""An id that would run a script where pages took ids for HTML."""
PAGES = ("?q=u0", "entity?type=user&id=u03", "releases?type=user&id=u03", "map?type=user")
TAGS = ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]
SCREENSHOTS = os.environ.get("TWHIN_EXPLORER_SCREENSHOTS")


def built(path: Path) -> Path:
    """Return what packaging/explorer.sh makes; where it is missing the test is skipped, but not in CI."""
    if not path.exists():
        told = f"{path.relative_to(ROOT)} is missing: packaging/explorer.sh makes it, with npm"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    return path


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """A service with two releases, one odd id and a map."""
    made = Store(f"{tmp_path_factory.mktemp('pages')}/home")
    names = {entity: small_store.ids(entity) for entity in small_store.NUM}
    names["user"][names["user"].index("u07")] = ODD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_store, "ids", lambda entity: names[entity])
        for day in range(2):
            days.make(made, day)
        maps = {"entities": ["user"], "method": "pca"}
        config = TwhinConfig.model_validate(days.CONFIG.model_dump() | {"maps": maps})
        entity_map.build(config, made, days.name(1))
    app = create_app(ServeOptions(home=made.root, interval=60.0))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, 60, "the service answers")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/explore/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def opened():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser.chromium(), args=[*browser.ARGUMENTS, *WEBGL])
        yield started
        started.close()


@pytest.fixture
def page(opened, url):
    """A fresh page, which fails the test where a script of it fails or asks another host."""
    with opened.new_context(viewport={"width": 1280, "height": 900}) as context:
        made = context.new_page()
        made.set_default_timeout(20_000)
        wrong: list[str] = []
        made.on("pageerror", lambda error: wrong.append(str(error)))
        made.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(url) else None)
        yield made
        assert wrong == []


def settled(page) -> None:
    """Wait until no part of the page is loading; parts are marked so before the page itself has loaded."""
    page.wait_for_function("() => !document.querySelector('[aria-busy]')")


def test_from_a_search_to_a_recommendation_with_its_reason(page, url):
    page.goto(url)
    page.get_by_label("Id of an entity").fill("u03")
    page.get_by_role("list", name="Entities found").get_by_role("link", name="u03").click()
    page.get_by_role("heading", name="u03").wait_for()
    page.get_by_role("button", name="follows").click()
    found = page.get_by_role("list", name="Recommended by follows")
    found.get_by_text("In between: ").first.wait_for()
    settled(page)
    text = page.locator("main").inner_text()
    for part in (
        "Together with: of the",
        "Near by vector: ",
        "likes→ item",
        "Nearest vectors",
        "2025-01-01",
        "raw_edges",
    ):
        assert part in text, part
    assert page.get_by_role("heading", name="This vector over the releases").is_visible()
    page.reload()  # the address has the relation
    page.get_by_role("list", name="Recommended by follows").wait_for()


def test_a_search_that_finds_more_than_it_shows_says_so(page, url):
    page.goto(f"{url}?q=u0")
    page.get_by_text("9 found.").wait_for()
    page.get_by_label("Id of an entity").fill("u")
    page.get_by_text("The first 20; there may be more.").wait_for()


def test_on_a_phone_pages_are_as_wide_as_the_screen_and_tables_scroll_instead_of_breaking_cells(page, url):
    page.set_viewport_size({"width": 375, "height": 740})
    for path in PAGES:
        page.goto(url + path)
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth") == 375, path
    page.goto(url + PAGES[2])
    settled(page)
    made = page.get_by_role("region", name="The two releases").locator("td").first
    lines = "one => { const range = new Range(); range.selectNodeContents(one); return range.getClientRects().length; }"
    assert made.evaluate(lines) == 1


def test_the_keys_alone_lead_from_a_search_to_a_recommendation(page, url):
    page.goto(url)
    settled(page)
    page.reload()  # as one who arrives, with nothing in focus but the field
    settled(page)

    def focused() -> str:
        return page.evaluate("document.activeElement.textContent || document.activeElement.id")

    def tab_to(text: str) -> None:
        for _ in range(40):
            if focused() == text:
                # What has the focus shows it.
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                return
            page.keyboard.press("Tab")
        pytest.fail(f"no {text} in the order of the focus")

    assert focused() == "q"
    page.keyboard.type("u03")
    page.get_by_role("link", name="u03").wait_for()
    tab_to("u03")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="follows").wait_for()
    page.keyboard.press("Tab")
    assert focused() == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    tab_to("follows")
    page.keyboard.press("Space")
    page.get_by_role("list", name="Recommended by follows").wait_for()
    assert page.get_by_role("button", name="follows").get_attribute("aria-pressed") == "true"


def test_an_id_is_shown_as_text_whatever_is_in_it(page, url):
    page.goto(f"{url}?q=%3Cimg")
    page.get_by_role("link", name=ODD).click()
    page.get_by_role("heading", name=ODD).wait_for()
    settled(page)
    assert page.locator("img").count() == 0
    assert page.title() == f"{ODD} · TwHIN explorer"
    page.goto(f"{url}entity?type=user&id=%3Cb%3Enobody")
    page.get_by_role("alert").first.get_by_text("no user has the id '<b>nobody'").wait_for()
    assert page.locator("main b").count() == 0


def test_two_releases_are_shown_side_by_side_with_one_entity_in_both(page, url):
    page.goto(f"{url}releases")
    page.get_by_role("region", name="Vectors of the later release").get_by_text("user").wait_for()
    page.get_by_role("searchbox", name="Id").fill("u03")
    page.get_by_role("button", name="Show").click()
    for day in (days.name(0), days.name(1)):
        near = page.get_by_role("region", name=f"Nearest to u03 in {day}")
        near.wait_for()
        assert near.locator("tbody tr").count() == 20
    page.get_by_label("Release", exact=True).select_option(label=days.name(0))
    page.wait_for_url("**release=2025-01-01*")


def test_the_map_pans_zooms_and_selects_by_mouse_keys_and_buttons(page, url):
    built(BUNDLE)
    page.goto(f"{url}map?type=user")
    canvas = page.locator("canvas[data-drawn='30']")
    canvas.wait_for()
    places = "[...document.querySelectorAll('#labels span')].map(one => one.style.transform).join()"

    def moved(act) -> None:
        page.wait_for_timeout(250)
        before = page.evaluate(places)
        assert before
        act()
        page.wait_for_function(f"before => {places} !== before", arg=before)

    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag() -> None:
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 80, y + 30, steps=5)
        page.mouse.up()

    moved(drag)
    moved(lambda: page.mouse.wheel(0, -200))
    moved(lambda: page.get_by_role("button", name="Show all").click())
    canvas.focus()
    for key in ("ArrowLeft", "+", "0"):
        moved(lambda key=key: page.keyboard.press(key))
    page.get_by_label("Find an id on the map").fill("u03")
    page.keyboard.press("Enter")
    page.locator("#selected").get_by_role("link", name="u03").wait_for()
    page.get_by_role("button", name="List cluster").first.click()
    assert page.evaluate("document.activeElement.id") == "members"


def test_a_narrow_map_shows_all_points_too(page, url):
    built(BUNDLE)
    page.set_viewport_size({"width": 375, "height": 900})
    points = page.request.get(f"{url}api/map?type=user").json()
    for end in (min, max):
        id = points["id"][points["x"].index(end(points["x"]))]
        page.goto(f"{url}map?type=user")
        page.locator("canvas[data-drawn='30']").wait_for()
        page.get_by_label("Find an id on the map").fill(id)
        page.keyboard.press("Enter")
        page.locator("#selected").get_by_role("link", name=id).wait_for()
        page.get_by_role("button", name="Show all").click()
        page.wait_for_timeout(500)  # until the view has moved
        assert page.locator("#labels .here").count() == 1, id


def test_without_the_drawing_the_map_is_a_table_and_says_how_to_get_it(page, url):
    page.route("**/vendor/scatterplot.js", lambda route: route.fulfill(status=404))
    page.goto(f"{url}map?type=user")
    page.get_by_text("packaging/explorer.sh builds it").wait_for()
    page.get_by_role("region", name="user: 30 of 30 entities").wait_for()
    page.get_by_role("button", name="List cluster").first.click()
    assert page.locator("#members a").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_pass_the_rules_of_axe(page, url, scheme):
    """Names and roles, the order of headings, contrast, and what else WCAG 2.2 asks and a program can see."""
    rules = built(AXE).read_text(encoding="utf-8")
    page.emulate_media(color_scheme=scheme)
    for path in PAGES:
        page.goto(url + path)
        settled(page)
        page.evaluate(rules)
        found = page.evaluate("rules => axe.run({runOnly: rules})", TAGS if scheme == "light" else ["color-contrast"])
        assert [f"{one['id']}: {one['nodes'][0]['html']}" for one in found["violations"]] == [], path
        assert found["passes"]
        if SCREENSHOTS:
            name = path.partition("?")[0] or "search"
            page.screenshot(path=f"{SCREENSHOTS}/{name}-{scheme}.png", full_page=True)
