"""The explorer's answers: the graph's edges, reasons that are in the graph, vectors' history, and pages without scripts
from elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from math import sqrt
from pathlib import Path
from typing import Any

import days
import numpy as np
import pytest
from fastapi.testclient import TestClient
from small_store import RELATIONS

from twhin_pipeline.lifecycle import drift
from twhin_pipeline.serving.app import create_app
from twhin_pipeline.serving.explorer import router
from twhin_pipeline.serving.options import ServeOptions
from twhin_pipeline.store import Store, database, releases
from twhin_pipeline.vectors import compatibility
from twhin_pipeline.vectors.opening import open_model

USERS = [f"u{number:02d}" for number in range(30)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Three days, of which the last but one is current."""
    made = Store(f"{tmp_path_factory.mktemp('explored')}/home")
    for day in range(3):
        days.make(made, day, publish=day < 2)
    return made


@pytest.fixture(scope="module")
def client(store):
    with TestClient(create_app(ServeOptions(home=store.root, interval=60.0)), base_url="http://127.0.0.1") as opened:
        yield opened


@pytest.fixture(scope="module")
def edges(store) -> list[tuple[str, str, str]]:
    """The edges of the current release: head, relation, tail."""
    rows = store.read("raw_edges", days.name(1)).to_pylist()
    return [(row["lhs"], row["rel"], row["rhs"]) for row in rows]


def ask(client: TestClient, path: str, status: int = 200, **values: Any) -> Any:
    answer = client.get(f"/explore/api/{path}", params=values)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_an_entity_is_linked_with_all_that_has_an_edge_with_it(client, edges):
    for entity, ids in (("user", USERS[:6]), ("item", ["0", "10", "20"])):
        for id in ids:
            expected = {
                (name, side): {edge[2 - 2 * at] for edge in edges if edge[1] == name and edge[2 * at] == id}
                for name, pair in RELATIONS.items()
                for at, side in enumerate(("lhs", "rhs"))
                if pair[at] == entity
            }
            found = ask(client, "entity", type=entity, id=id, count=100)["linked"]
            assert {(one["relation"], one["side"]): set(one["ids"]) for one in found} == expected
            assert all(one["count"] == len(one["ids"]) for one in found)
            few = ask(client, "entity", type=entity, id=id, count=2)["linked"]
            assert [one["count"] for one in few] == [one["count"] for one in found]
            assert all(len(one["ids"]) == min(2, one["count"]) for one in few)


def test_an_integer_in_another_spelling_is_the_same_entity(client):
    assert ask(client, "entity", type="item", id="+10") == ask(client, "entity", type="item", id="10")


def links(edges: list[tuple[str, str, str]]) -> dict[tuple[str, str], set[tuple[str, str, tuple[str, str]]]]:
    """Return what each entity is linked with: relation, own side and the other entity."""
    result = defaultdict(set)
    for lhs, name, rhs in edges:
        head, tail = ((kind, id) for kind, id in zip(RELATIONS[name], (lhs, rhs), strict=True))
        result[head].add((name, "lhs", tail))
        result[tail].add((name, "rhs", head))
    return result


def test_every_reason_is_in_the_graph_and_the_best_of_its_kind_comes_first(client, edges):
    near = links(edges)
    seen: Counter[str] = Counter()
    for name, (mine, theirs) in RELATIONS.items():
        for head in USERS[:12]:
            answer = ask(client, "recommendations", relation=name, id=head, count=5)
            known = {tail for lhs, rel, tail in edges if (lhs, rel) == (head, name)}
            for one in answer["recommended"]:
                tail = one["id"]
                assert tail not in known
                heads = {
                    end: {lhs for lhs, rel, rhs in edges if rel == name and rhs == end} - {head}
                    for end in {*known, tail}
                }
                reasons = one["reasons"]
                seen.update(reason["kind"] for reason in reasons)
                direct = [reason for reason in reasons if reason["kind"] == "direct"]
                assert {(d["relation"], d["side"]) for d in direct} == {
                    (rel, side) for rel, side, other in near[mine, head] if other == (theirs, tail)
                }
                together = [reason for reason in reasons if reason["kind"] == "together"]
                cosines = {
                    end: len(heads[tail] & heads[end]) / sqrt(len(heads[tail]) * len(heads[end]))
                    for end in known
                    if heads[tail] & heads[end]
                }
                best = sorted(cosines, key=lambda end: (-cosines[end], end))[:2]
                assert [reason["id"] for reason in together] == best
                for reason in together:
                    assert reason["cosine"] == pytest.approx(cosines[reason["id"]])
                    assert (reason["shared"], reason["heads"]) == (
                        len(heads[tail] & heads[reason["id"]]), len(heads[tail])
                    )  # fmt: skip
                via = [reason for reason in reasons if reason["kind"] == "via"]
                between = {other for _, _, other in near[mine, head]} & {other for _, _, other in near[theirs, tail]}
                between -= {(mine, head), (theirs, tail)}
                rarest = sorted(between, key=lambda other: (len(near[other]), *other))[:2]
                assert [(reason["entity"], reason["id"]) for reason in via] == rarest
                for reason in via:
                    other = (reason["entity"], reason["id"])
                    assert (reason["relation"], reason["side"], other) in near[mine, head]
                    assert (reason["tail_relation"], reason["tail_side"], other) in near[theirs, tail]
                    assert reason["degree"] == len(near[other])
                assert all((r["id"], name, tail) in edges for r in reasons if r["kind"] == "near")
    assert set(seen) == {"direct", "together", "via", "near"}


def test_requests_at_the_same_time_get_the_answers_that_they_get_alone(client):
    asked = [("recommendations", {"relation": name, "id": id}) for name in RELATIONS for id in USERS[:4]]
    alone = [ask(client, path, **values) for path, values in asked]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(lambda one: ask(client, one[0], **one[1]), asked)) == alone


def test_search_finds_an_id_then_beginnings_then_parts_and_else_what_is_spelled_alike(client):
    assert [hit["how"] for hit in ask(client, "search", q="U03")] == ["beginning"]
    found = ask(client, "search", q="u1")
    assert [hit["id"] for hit in found] == [f"u1{digit}" for digit in range(10)]
    assert ask(client, "search", q="10")[0] == {"entity": "item", "id": "10", "how": "id", "trained": True}
    assert "u10" in [hit["id"] for hit in ask(client, "search", q="10") if hit["how"] == "part"]
    assert {hit["how"] for hit in ask(client, "search", q="v07")} == {"spelling"}
    assert ask(client, "search", q="v07")[0]["id"] == "u07"
    assert {hit["entity"] for hit in ask(client, "search", q="1", type="user")} == {"user"}
    assert ask(client, "search", q="  ") == ask(client, "search", q="§§§§§§§§") == []


def test_a_history_has_the_cosines_of_the_vectors_as_they_are_and_through_the_maps(client, store):
    made = sorted((releases.read(store, name) for name in releases.names(store)), key=lambda one: one.created)
    models = [open_model(releases.opened(store, one), one.snapshot) for one in made]
    here = models[1].get_embedding("user", "u03")

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    found = ask(client, "history", type="user", id="u03", count=4)
    assert [one["release"] for one in found] == [one.name for one in made]
    for then, model in zip(found, models, strict=True):
        vector = model.get_embedding("user", "u03")
        assert then["norm"] == pytest.approx(np.linalg.norm(vector), rel=1e-5)
        assert then["cosine"] == pytest.approx(cosine(here, vector), abs=1e-5)
        assert [one for one, _ in then["neighbors"]] == [one for one, _ in model.neighbors("user", "u03", 4)]
        kept = {one for one, _ in then["neighbors"]} & {one for one, _ in models[1].neighbors("user", "u03", 4)}
        assert then["kept"] == len(kept) / 4
    back = compatibility.maps_into(store, made[1], made[0].name)["user"]
    assert found[0]["mapped"] == pytest.approx(cosine(here @ back, models[0].get_embedding("user", "u03")), abs=1e-5)
    onward = compatibility.maps_into(store, made[2], made[1].name)["user"]
    assert found[2]["mapped"] == pytest.approx(cosine(models[2].get_embedding("user", "u03") @ onward, here), abs=1e-5)
    assert (found[1]["mapped"], found[1]["cosine"]) == (1.0, pytest.approx(1.0))


def test_two_releases_are_compared_as_drift_does(client, store):
    first, second = sorted(releases.names(store))[:2]
    answer = ask(client, "compare", before=first, after=second)
    before, after = (releases.read(store, name) for name in (first, second))
    with database.connect(store=store) as con:
        expected = {
            entity: drift.compared(entity, compatibility.shared(con, store, before, after, entity, 1_000), 10)
            for entity in ("user", "item")
        }
    assert {one["entity"]: one["kept"] for one in answer["drift"]} == {n: d.kept for n, d in expected.items()}
    for one in answer["drift"]:
        assert one["neighbors"] == pytest.approx(expected[one["entity"]].neighbors)
        assert one["cosine"] == pytest.approx(expected[one["entity"]].cosine)
    assert [one["release"] for one in answer["releases"]] == [first, second]


def test_a_release_is_shown_at_its_versions_and_the_current_one_by_default(client, store):
    listed = ask(client, "releases")
    assert listed["shown"] == releases.current(store).name == listed["releases"][1]["release"]
    for name in (one["release"] for one in listed["releases"]):
        assert ask(client, "release", release=name)["release"] == name
        near = ask(client, "neighbors", release=name, type="user", id="u05", count=3)["nearest"]
        release = releases.read(store, name)
        expected = open_model(releases.opened(store, release), release.snapshot).neighbors("user", "u05", 3)
        assert [one["id"] for one in near] == [one for one, _ in expected]
    assert not ask(client, "neighbors", type="user", id="nobody")["there"]


def test_the_origin_of_a_vector_is_its_trace(client, store):
    found = ask(client, "origin", type="user", id="u03")
    assert found["release"]["name"] == releases.current(store).name
    assert [one["table"] for one in found["tables"]][0::5] == ["embeddings/user", "raw_edges"]


@pytest.mark.parametrize(
    ("path", "values", "status", "words"),
    [
        ("entity", {"type": "usr", "id": "u03"}, 404, "did you mean 'user'"),
        ("entity", {"type": "user", "id": "u99"}, 404, "no user has the id 'u99'; nearest:"),
        ("entity", {"type": "item", "id": "ten"}, 404, "no item has the id 'ten'"),
        ("entity", {"type": "relations", "id": "likes"}, 404, "unknown entity type"),
        ("entity", {"type": "user", "id": "u03", "count": 1_000}, 422, "count"),
        ("history", {"type": "usr", "id": "u03"}, 404, "unknown entity type"),
        ("origin", {"type": "user", "id": "u99"}, 404, "no user has the id"),
        ("recommendations", {"relation": "like", "id": "u03"}, 404, "unknown relation 'like'"),
        ("release", {"release": "2020-01-01-x"}, 400, "unknown release"),
        ("compare", {"before": "x", "after": "y"}, 400, "unknown release"),
        ("map", {"type": "user"}, 400, "twhin map --snapshot 2025-01-02"),
        ("map", {"type": "usr"}, 404, "did you mean 'user'"),
        ("map", {"type": "../raw_edges"}, 404, "unknown entity type '../raw_edges'"),
        ("map", {"type": "x" * 1_000}, 404, "unknown entity type"),
        ("map", {"type": "a\0b"}, 404, "unknown entity type"),
    ],
)
def test_what_is_not_there_is_an_error_that_names_the_nearest_or_a_remedy(client, store, path, values, status, words):
    error = ask(client, path, status, **values)["error"]
    assert words in error and store.root not in error


def test_the_newest_vectors_are_shown_where_nothing_has_been_published(tmp_path):
    made = Store(f"{tmp_path}/home")
    days.make(made, 0, publish=False)
    for name in releases.names(made):
        (Path(made.root) / "releases" / f"{name}.json").unlink()
    with TestClient(create_app(ServeOptions(home=made.root, interval=60.0)), base_url="http://127.0.0.1") as client:
        assert ask(client, "releases") == {"shown": None, "releases": []}
        assert ask(client, "release")["release"] is None
        assert ask(client, "entity", type="user", id="u03")["nearest"]
        assert len(ask(client, "history", type="user", id="u03")) == 0
        assert "no release yet" in ask(client, "compare", 400)["error"]
        assert "unknown entity type" in ask(client, "map", 404, type="../raw_edges")["error"]


class Inline(HTMLParser):
    """Collects what a page would run or style by itself, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.inline += [name for name in values if name.startswith("on") or name == "style"]
        self.loads += [
            str(values[name]) for name in ("src", "href") if name in values and tag in ("script", "link", "img")
        ]
        self._script = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script and data.strip():
            self.inline.append(data)


@pytest.mark.parametrize("path", ["", "entity", "releases", "map"])
def test_a_page_runs_files_of_its_own_alone(client, path):
    answer = client.get(f"/explore/{path}")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["script-src"] == ("'self' 'unsafe-eval'" if path == "map" else "'self'")
    title = path.capitalize() or "Search"
    assert re.findall("<title>(.+) · TwHIN explorer</title>", answer.text) == [title]
    marked = [] if path == "entity" else [title]
    assert re.findall('aria-current="page">(.+)</a>', answer.text) == marked
    page = Inline()
    page.feed(answer.text)
    assert page.inline == []
    assert page.loads
    for name in page.loads:
        loaded = client.get(f"/explore/{name}")
        assert loaded.status_code == 200 and name.startswith("static/")


def test_scripts_load_nothing_from_elsewhere_and_parse_no_html():
    for path in router.STATIC.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), path
        assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}, path


def test_no_other_file_is_served(client):
    for name in ("../router.py", "%2e%2e/router.py", "nothing.js", "", "vendor"):
        assert client.get(f"/explore/static/{name}").status_code == 404
    assert client.get("/explore", follow_redirects=False).headers["location"] == "explore/"


def test_the_explorer_asks_for_the_key_as_all_else_does(store, monkeypatch):
    monkeypatch.setenv("TWHIN_API_KEY", "0123456789abcdef")
    with TestClient(create_app(ServeOptions(home=store.root, interval=60.0)), base_url="http://127.0.0.1") as client:
        for path in ("", "static/common.js", "api/releases"):
            refused = client.get(f"/explore/{path}")
            assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic")
            assert client.get(f"/explore/{path}", auth=("", "0123456789abcdef")).status_code == 200
