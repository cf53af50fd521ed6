"""One worker: what it answers, what it refuses, and with which words."""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import days
import httpx
import pyarrow as pa
import pytest
import small_store
from service_process import served

from twhin_pipeline import load_model
from twhin_pipeline.errors import UnavailableError
from twhin_pipeline.serving.app import create_app
from twhin_pipeline.serving.options import ServeOptions
from twhin_pipeline.store import Store, releases
from twhin_pipeline.vectors import calibration, mixture
from twhin_pipeline.vectors.interests import Interests
from twhin_pipeline.vectors.reader import TwhinEmbeddings
from twhin_pipeline.words import CALIBRATION

KEY = "a key of a test".replace(" ", "-") + "-0123456789"
USERS, ITEMS = small_store.ids("user"), small_store.ids("item")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("serving") / "home"))
    days.make(store, 0)
    of_likes = {
        "relation": ["likes"], "method": ["platt"], "edges": [99], "negatives": [10], "scores": [[0.0, 1.0]],
        "log_odds": [[-1.0, 0.5]],
    }  # fmt: skip
    parents = store.versions(days.name(0), ["twhin_model"])
    with store.replace(CALIBRATION, days.name(0), config_hash="c", parents=parents) as draft:
        draft.write(pa.table(of_likes, schema=calibration.SCHEMA))
    return store


@pytest.fixture(scope="module")
def model(store: Store) -> TwhinEmbeddings:
    return load_model(store.root)


@pytest.fixture(scope="module")
def client(store: Store) -> Iterator[httpx.Client]:
    with served(store.root) as client:
        yield client


def pairs(results: Any, of: str, value: str) -> list[list[tuple[Any, float]]]:
    return [[(one["id"], one[value]) for one in result[of]] for result in results]


@pytest.mark.parametrize("known", [True, False, "any"])
def test_recommendations_are_the_models_for_one_head_and_for_many(client, model, known):
    heads = USERS[:4]
    plain = [model.recommend("likes", head, 5, known) for head in heads]
    many = client.post("/recommend", json={"ids": heads, "relation": "likes", "k": 5, "exclude_known": known})
    assert many.status_code == 200, many.text
    assert [one["id"] for one in many.json()["results"]] == heads
    assert many.json()["relation"] == "likes"
    for found, wanted in zip(pairs(many.json()["results"], "tails", "score"), plain, strict=True):
        assert [id for id, _ in found] == [id for id, _ in wanted]
        assert [score for _, score in found] == pytest.approx([score for _, score in wanted], rel=1e-5)
    asked = {"id": heads[2], "relation": "likes", "k": 5, "exclude_known": str(known).lower()}
    one = client.get("/recommend", params=asked)
    assert [tail["id"] for tail in one.json()["results"][0]["tails"]] == [id for id, _ in plain[2]]


def test_recommendations_have_the_probability_that_the_service_says_of_their_edges(client):
    for ids in (USERS[:1], USERS[:3]):
        asked = {"ids": ids, "relation": "likes", "k": 4}
        for head in client.post("/recommend", json=asked).json()["results"]:
            edges = {"lhs": [head["id"]], "rhs": [tail["id"] for tail in head["tails"]], "relation": "likes"}
            said = client.post("/score", json=edges).json()["probabilities"]
            assert [tail["probability"] for tail in head["tails"]] == pytest.approx(said, rel=1e-5)
            assert len(said) == 4 and said == sorted(said, reverse=True)
    explored = client.get("/explore/api/recommendations", params={"id": USERS[2], "relation": "likes", "count": 4})
    assert [one["probability"] for one in explored.json()["recommended"]] == pytest.approx(said, rel=1e-5)
    uncalibrated = client.get("/recommend", params={"id": USERS[0], "relation": "rates", "k": 2}).json()
    assert [tail["probability"] for tail in uncalibrated["results"][0]["tails"]] == [None, None]


def test_a_service_that_prepares_interests_recommends_by_them_and_another_says_how(client, store, model):
    asked = {"ids": USERS[:2], "relation": "likes", "k": 5, "interests": True}
    refused = client.post("/recommend", json=asked)
    assert refused.status_code == 400 and "serve with --interests" in refused.json()["error"]
    wanted = model.recommend("likes", USERS[:2], 5, interests=Interests()).read_all()["rhs"].to_pylist()
    plain = model.recommend("likes", USERS[:2], 5).read_all()["rhs"].to_pylist()
    with served(store.root, interests=True) as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture.Mixture, "__init__", lambda *_: pytest.fail("made in a request"))
        found = other.post("/recommend", json=asked).json()["results"]
    assert [tail["id"] for head in found for tail in head["tails"]] == wanted != plain


def test_how_a_request_is_searched_can_be_chosen(client, model):
    asked = {"id": USERS[0], "relation": "likes", "k": 5}
    exact = client.get("/recommend", params={**asked, "search": "exact"})
    assert exact.json() == client.get("/recommend", params=asked).json()
    for path, more in (("/recommend", asked), ("/neighbors", {"entity": "item", "id": ITEMS[0]})):
        refused = client.get(path, params={**more, "search": "index"})
        assert refused.status_code == 400 and "has no index of item" in refused.json()["error"]


def test_tails_that_a_request_excludes_are_left_out_and_others_take_their_places(client, model):
    plain = [id for id, _ in model.recommend("likes", USERS[0], 8)]
    asked = {"ids": [USERS[0]], "relation": "likes", "k": 5, "exclude": [plain[0], str(plain[3])]}
    kept = client.post("/recommend", json=asked).json()["results"][0]["tails"]
    assert [one["id"] for one in kept] == [plain[i] for i in (1, 2, 4, 5, 6)]
    asked = {"id": USERS[0], "relation": "likes", "k": 5, "exclude": [plain[0], plain[3]]}
    assert client.get("/recommend", params=asked).json()["results"][0]["tails"] == kept


def test_neighbors_scores_and_vectors_are_the_models(client, model):
    near = client.post("/neighbors", json={"entity": "item", "ids": ITEMS[:2], "k": 3}).json()["results"]
    for found, id in zip(pairs(near, "neighbors", "similarity"), ITEMS, strict=False):
        wanted = model.neighbors("item", id, 3)
        assert [one for one, _ in found] == [one for one, _ in wanted]
        assert [cosine for _, cosine in found] == pytest.approx([cosine for _, cosine in wanted], rel=1e-5)
    edges = {"lhs": USERS[:3], "rhs": ITEMS[:3], "relation": "likes"}
    probabilities = client.post("/score", json=edges).json()["probabilities"]
    assert probabilities == pytest.approx(model.predict_relation(USERS[:3], ITEMS[:3], "likes").tolist(), rel=1e-5)
    ranked = client.post("/score", json={**edges, "lhs": USERS[:1]}).json()["probabilities"]
    assert ranked == pytest.approx(model.predict_relation(USERS[0], ITEMS[:3], "likes").tolist(), rel=1e-5)
    one = client.get("/score", params={"lhs": USERS[0], "rhs": ITEMS[0], "relation": "likes"}).json()
    assert one["probabilities"] == pytest.approx([ranked[0]], rel=1e-5)
    vectors = client.post("/embedding", json={"entity": "user", "ids": USERS}).json()["embeddings"]
    assert vectors == pytest.approx(model.get_embedding("user", USERS), rel=1e-6)


def test_ids_that_come_twice_or_as_texts_get_their_results_each_time(client, model):
    asked = [ITEMS[3], str(ITEMS[3]), ITEMS[0], ITEMS[3]]
    results = client.post("/neighbors", json={"entity": "item", "ids": asked, "k": 3}).json()["results"]
    assert [one["id"] for one in results] == asked
    nearest = [[near["id"] for near in one["neighbors"]] for one in results]
    assert nearest == [
        [id for id, _ in model.neighbors("item", id, 3)] for id in (ITEMS[3], ITEMS[3], ITEMS[0], ITEMS[3])
    ]


def test_a_head_without_results_has_an_empty_list_in_its_place(client):
    every = {"ids": [USERS[0], USERS[1], USERS[2]], "relation": "likes", "exclude": ITEMS}
    assert client.post("/recommend", json=every).json()["results"] == [{"id": id, "tails": []} for id in USERS[:3]]


def test_ids_without_a_vector_are_skipped_or_inferred_from_their_edges_as_the_library_does(client, model):
    asked = {"ids": ["new", USERS[0]], "relation": "likes", "k": 4}

    def tails(**more: Any) -> list[list[int]]:
        answer = client.post("/recommend", json={**asked, **more}).json()
        assert answer["missing"] == (["new"] if more["missing"] == "skip" else [])
        return [[tail["id"] for tail in one["tails"]] for one in answer["results"]]

    assert client.post("/recommend", json=asked).status_code == 404
    plain = [id for id, _ in model.recommend("likes", USERS[0], 4)]
    assert tails(missing="skip") == [plain]
    edges = {"new": [["likes", ITEMS[0]], ["likes", str(ITEMS[5])]]}
    inferred = [id for id, _ in model.recommend("likes", "new", 4, missing="infer", edges=edges)]
    assert tails(missing="infer", edges=edges) == [inferred, plain] and ITEMS[0] not in inferred
    assert tails(missing="infer", edges=edges, ids=["new"]) == [inferred]
    wanted = {"entity": "user", "ids": ["new"], "missing": "infer", "edges": edges}
    vectors = client.post("/embedding", json=wanted).json()["embeddings"]
    assert vectors == pytest.approx(model.get_embedding("user", ["new"], "infer", edges), rel=1e-5)
    near = client.post("/neighbors", json={"entity": "user", "ids": ["x"], "missing": "skip"}).json()
    assert near["results"] == [] and near["missing"] == ["x"]
    lacking = client.post("/neighbors", json={"entity": "user", "ids": ["new"], "missing": "infer"})
    assert lacking.status_code == 400 and "no edge of user 'new'" in lacking.json()["error"]
    many = {"new": [["likes", ITEMS[0]]] * 1_000}
    assert client.post("/embedding", json={"entity": "user", "ids": ["new"], "edges": many}).status_code == 422


def test_an_answer_names_its_release_in_a_field_and_a_header(client, store):
    answer = client.get("/embedding", params={"entity": "user", "id": USERS[0]})
    current = releases.current(store)
    assert answer.json()["release"] == answer.headers["Twhin-Release"] == current.name
    assert answer.json()["snapshot"] == current.snapshot
    ready = client.get("/readyz")
    assert ready.status_code == 200 and ready.json()["release"] == current.name and ready.json()["failed"] is None


def test_ids_of_any_characters_are_found_and_integers_stay_integers(tmp_path):
    names = ["a/b", "ä ö?&=#%2F", "..", "日本 🐧", 'quote"\\', "x\ny"]
    store = Store(str(tmp_path / "home"))
    original = small_store.ids
    small_store.ids = lambda entity: [*names, *original(entity)[len(names) :]] if entity == "user" else original(entity)
    try:
        days.make(store, 0)
    finally:
        small_store.ids = original
    with served(store.root) as client:
        for name in names:
            one = client.get("/recommend", params={"id": name, "relation": "likes", "k": 2})
            many = client.post("/recommend", json={"ids": [name], "relation": "likes", "k": 2})
            assert one.status_code == 200, one.text
            assert one.json() == many.json()
            assert one.json()["results"][0]["id"] == name
            assert all(isinstance(tail["id"], int) for tail in one.json()["results"][0]["tails"])
        found = client.get("/neighbors", params={"entity": "user", "id": names[0], "k": len(USERS)})
        assert {one["id"] for one in found.json()["results"][0]["neighbors"]} >= set(names[1:])


@pytest.mark.parametrize(
    ("path", "asked", "status", "message"),
    [
        ("/recommend", {"id": "u100", "relation": "likes"}, 404, r"no user has the id 'u100'; nearest: 'u10'"),
        ("/neighbors", {"entity": "item", "id": "7"}, 404, "no item has the id '?7'?; nearest: 10, 0, 20"),
        ("/neighbors", {"entity": "items", "id": "7"}, 404, "unknown entity type 'items'; did you mean 'item'"),
        ("/recommend", {"id": "u10", "relation": "like"}, 404, "unknown relation 'like'; did you mean 'likes'"),
        ("/recommend", {"id": "u10"}, 400, "several relations; say which one: likes, follows, rates"),
        ("/recommend", {"id": "u10", "relation": "likes", "k": 0}, 422, "k: .*greater than or equal to 1"),
        ("/recommend", {"id": "u10", "relation": "likes", "k": 10_000}, 422, "k: 10,000.*1,000 at most.*--max-k"),
        ("/recommend", {"id": "u10", "relation": "likes", "exclude_known": "some"}, 422, "exclude_known"),
        ("/recommend", {"relation": "likes"}, 422, "id: Field required"),
        ("/recommend", {"id": "u10", "relations": "likes"}, 422, "relations: Extra inputs"),
        ("/nothing", {}, 404, "Not Found"),
    ],
)
def test_a_mistake_gets_the_librarys_message_as_json(client, path, asked, status, message):
    answer = client.get(path, params=asked)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert re.search(message, answer.json()["error"]), answer.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"ids": [], "relation": "likes"}, "ids: List should have at least 1 item"),
        ({"ids": ["u10", True], "relation": "likes"}, "ids.1: an id is a string or an integer"),
        ({"ids": ["u10", 1.5, None], "relation": "likes"}, "ids.1: an id .*; ids.2: an id"),
        ({"ids": ["u10"] * 1_001, "relation": "likes"}, "1,001 ids, and a request may have 1,000.*--max-batch"),
        ({"ids": ["u10"] * 600, "exclude": [1] * 600, "relation": "likes"}, "1,200 ids"),
        ({"ids": ["u10"] * 101, "k": 1_000, "relation": "likes"}, "1,000 for each of 101 ids.*100,000.*--max-results"),
        ({"ids": "u10", "relation": "likes"}, "ids: Input should be a valid list"),
    ],
)
def test_a_wrong_body_is_refused_by_field(client, body, message):
    answer = client.post("/recommend", json=body)
    assert answer.status_code == 422
    assert re.search(message, answer.json()["error"]), answer.text


def test_bodies_that_are_no_json_and_ids_of_half_a_character_are_refused(client):
    kind = {"content-type": "application/json"}
    for body in (b"{", b"[" * 100_000, b'{"ids": [' + b"9" * 10_000 + b"]}", b"\xff\xfe", b""):
        assert client.post("/recommend", content=body, headers=kind).status_code in (400, 422)
    half = client.post("/recommend", content=rb'{"ids": ["\ud800"], "relation": "likes"}', headers=kind)
    assert half.status_code == 422 and "half a Unicode character" in half.json()["error"]
    huge = client.post("/neighbors", json={"entity": "item", "ids": [10**30]})
    assert huge.status_code == 404 and "nearest: 390" in huge.json()["error"]


def test_a_body_beyond_the_limit_is_refused_by_its_header_and_as_it_comes(store):
    with served(store.root, max_body=1_000) as client:
        large = b'{"ids": ["' + b"x" * 2_000 + b'"]}'
        stated = client.post("/recommend", content=large, headers={"content-type": "application/json"})

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(large), 100):
                yield large[start : start + 100]

        streamed = client.post("/recommend", content=pieces(), headers={"content-type": "application/json"})
        for answer in (stated, streamed):
            assert answer.status_code == 413 and "1,000 bytes" in answer.json()["error"]


def test_a_request_beyond_the_time_limit_gets_503_and_the_worker_answers_on(store, monkeypatch):
    released = threading.Event()
    plain = TwhinEmbeddings.neighbors

    def slow(self: TwhinEmbeddings, *rest: Any, **options: Any) -> Any:
        if options.get("ids") == USERS[1]:
            released.wait(30)
        return plain(self, *rest, **options)

    monkeypatch.setattr(TwhinEmbeddings, "neighbors", slow)
    with served(store.root, time_limit=0.3) as client:
        started = time.monotonic()
        answer = client.get("/neighbors", params={"entity": "user", "id": USERS[1]})
        assert answer.status_code == 503 and "time limit of 0.3 s" in answer.json()["error"]
        assert answer.headers["Retry-After"] == "1"
        assert time.monotonic() - started < 5
        assert client.get("/readyz").status_code == 200  # while the one thread is still busy
        assert client.get("/embedding", params={"entity": "user", "id": USERS[2]}).status_code == 503  # waits in vain
        released.set()
        deadline = time.monotonic() + 10
        while client.get("/embedding", params={"entity": "user", "id": USERS[2]}).status_code != 200:
            assert time.monotonic() < deadline


def test_without_a_key_a_name_that_another_site_lets_lead_here_is_refused(store, monkeypatch):
    with served(store.root) as client:
        for host in ("127.0.0.1", "127.0.0.1:8000", "localhost:1", "[::1]:8000", "[::1]", "LOCALHOST"):
            assert client.get("/healthz", headers={"Host": host}).status_code == 200, host
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "192.0.2.1"):
            refused = client.get("/embedding", params={"entity": "user", "id": USERS[0]}, headers={"Host": host})
            assert refused.status_code == 421 and "serve with a key" in refused.json()["error"], host
    monkeypatch.setenv("TWHIN_API_KEY", KEY)
    with served(store.root) as client:
        headers = {"Host": "recommendations.example", "Authorization": f"Bearer {KEY}"}
        asked = {"entity": "user", "id": USERS[0]}
        assert client.get("/embedding", params=asked, headers=headers).status_code == 200


def test_with_a_key_everything_but_the_probes_asks_for_it(store, tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"another-key-0123456789\n\n{KEY}\n")
    asked = {"params": {"entity": "user", "id": USERS[0]}}
    with served(store.root, api_key_file=str(file)) as client:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        for path in ("/embedding", "/metrics", "/openapi.json", "/nothing", "/explore/"):
            for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}, {"X-API-Key": KEY}):
                refused = client.get(path, headers=headers)
                assert refused.status_code == 401 and "Authorization: Bearer KEY" in refused.json()["error"]
        assert client.get("/embedding").headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/explore/").headers["WWW-Authenticate"].startswith("Basic ")  # the browser asks
        password = base64.b64encode(f"anyone:{KEY}".encode()).decode()
        for value in (f"Bearer {KEY}", f"bearer {KEY}", "Bearer another-key-0123456789", f"Basic {password}"):
            assert client.get("/embedding", headers={"Authorization": value}, **asked).status_code == 200
        assert client.get("/embedding", headers={"Authorization": "Basic ???"}, **asked).status_code == 401
        schema = client.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert schema["paths"]["/recommend"]["post"]["security"] == [{"HTTPBearer": []}]
    monkeypatch.setenv("TWHIN_API_KEY", KEY)
    with served(store.root) as client:
        assert client.get("/embedding", **asked).status_code == 401
        assert client.get("/embedding", headers={"Authorization": f"Bearer {KEY}"}, **asked).status_code == 200


def test_the_log_has_a_short_line_for_each_request_without_ids_and_keys(store, monkeypatch, caplog):
    monkeypatch.setenv("TWHIN_API_KEY", KEY)
    with served(store.root) as client, caplog.at_level("INFO"):
        headers = {"Authorization": f"Bearer {KEY}"}
        client.get("/neighbors", params={"entity": "user", "id": USERS[0]}, headers=headers)
        client.get("/neighbors", params={"entity": "user", "id": USERS[0]})
    lines = [one.getMessage() for one in caplog.records if one.name == "twhin.access"]
    assert [line.rsplit(" ", 2)[0] for line in lines] == ["GET /neighbors 200", "GET /neighbors 401"]
    assert KEY not in caplog.text and USERS[0] not in " ".join(lines)


def test_an_error_of_the_service_is_json_and_in_the_log_and_counted(store, monkeypatch, caplog):
    with served(store.root) as client:
        monkeypatch.setattr(TwhinEmbeddings, "get_embedding", lambda *_: 1 / 0)
        answer = client.get("/embedding", params={"entity": "user", "id": USERS[0]})
        assert answer.status_code == 500 and "ZeroDivision" not in answer.text and list(answer.json()) == ["error"]
        assert "ZeroDivisionError" in caplog.text
        counted = client.get("/metrics").text
        assert 'twhin_requests_total{endpoint="/embedding",status="500"} 1.0' in counted

        def away(*_: Any) -> None:
            raise UnavailableError(f"{store.root}/x: is away; wait")

        monkeypatch.setattr(TwhinEmbeddings, "get_embedding", away)
        answer = client.get("/embedding", params={"entity": "user", "id": USERS[0]})
        assert answer.status_code == 503 and answer.json() == {"error": "the store/x: is away; wait"}


def test_a_store_without_a_release_is_alive_and_not_ready_until_one_is_published(tmp_path):
    store = Store(str(tmp_path / "home"))
    with served(store.root, interval=0.05) as client:
        assert client.get("/healthz").status_code == 200
        waiting = client.get("/readyz")
        assert waiting.status_code == 503 and not waiting.json()["ready"]
        assert "nothing has been published yet" in waiting.json()["failed"]["reason"]
        assert store.root not in waiting.text
        refused = client.get("/embedding", params={"entity": "user", "id": USERS[0]})
        assert refused.status_code == 503 and "not ready" in refused.json()["error"]
        release = days.make(store, 0)
        deadline = time.monotonic() + 30
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        answer = client.get("/embedding", params={"entity": "user", "id": USERS[0]})
        assert answer.status_code == 200 and answer.json()["release"] == release.name


def test_openapi_describes_every_endpoint_with_examples_and_the_services_limits(store):
    schema = create_app(ServeOptions(store.root, max_k=77, max_batch=55)).openapi()
    assert set(schema["paths"]) >= {
        "/recommend", "/neighbors", "/score", "/embedding", "/healthz", "/readyz", "/metrics"
    }  # fmt: skip
    many = schema["components"]["schemas"]["RecommendMany"]["properties"]
    assert many["k"]["maximum"] == 77 and many["ids"]["maxItems"] == 55
    assert many["ids"]["examples"] == [["u_000042", "u_000007"]]
    (k,) = [one for one in schema["paths"]["/recommend"]["get"]["parameters"] if one["name"] == "k"]
    assert k["schema"]["maximum"] == 77
    for path, methods in schema["paths"].items():
        for one in methods.values():
            assert one["summary"] and one["description"], path
