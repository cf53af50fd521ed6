"""The whole service: two workers behind one address, under load, with promotions; and what it refuses to start with."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import days
import httpx
import psutil
import pytest
import small_store
from service_process import ServiceProcess, serving

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.serving.options import ServeOptions, check_access
from twhin_pipeline.store import Store, releases
from twhin_pipeline.vectors.opening import open_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings

KEY = "key-of-these-tests-0123456789"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
USERS, ITEMS = small_store.ids("user"), small_store.ids("item")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("server") / "home"))
    days.make(store, 0)
    days.make(store, 1, publish=False)
    return store


@pytest.fixture(scope="module")
def service(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Two workers that ask for a key, as beyond loopback."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(f"{KEY}\n")
    with serving(store.root, "--interval", "0.1", "--api-key-file", str(file), workers=2) as service:
        yield service


def samples(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", headers=WITH_KEY).text
    return {name: float(value) for name, value in re.findall(r"^(twhin\S+) (\S+)$", text, re.MULTILINE)}


def total(found: dict[str, float], name: str) -> float:
    return sum(value for key, value in found.items() if key.startswith(name))


class Load:
    """Clients that ask all kinds of questions until they are stopped."""

    def __init__(self, url: str, clients: int = 4) -> None:
        self.url, self.answers, self.ended = url, [], threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(clients)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, headers=WITH_KEY, timeout=60) as client:
            while not self.ended.is_set():
                asked: dict[str, Any] = rng.choice(
                    [
                        {"id": rng.choice(USERS), "relation": "likes", "k": 4},
                        {"id": rng.choice(ITEMS), "entity": "item", "k": 4},
                        {"id": rng.choice(USERS), "entity": "user"},
                        {"lhs": rng.choice(USERS), "rhs": rng.choice(ITEMS), "relation": "rates"},
                    ]
                )
                try:
                    answer = client.get(f"/{kind(asked)}", params=asked)
                    self.answers.append((asked, answer.status_code, answer.json(), answer.headers))
                except httpx.HTTPError as error:
                    self.answers.append((asked, repr(error), None, None))


def kind(asked: dict[str, Any]) -> str:
    if "lhs" in asked:
        return "score"
    return "recommend" if "relation" in asked else "neighbors" if "k" in asked else "embedding"


def expected(model: TwhinEmbeddings, asked: dict[str, Any]) -> Any:
    if kind(asked) == "score":
        return [model.predict_relation(asked["lhs"], asked["rhs"], "rates")]
    if kind(asked) == "recommend":
        return [(tail, pytest.approx(score, rel=1e-4)) for tail, score in model.recommend("likes", asked["id"], 4)]
    if kind(asked) == "neighbors":
        return [(one, pytest.approx(cosine, rel=1e-4)) for one, cosine in model.neighbors("item", asked["id"], 4)]
    return [pytest.approx(model.get_embedding("user", asked["id"]).tolist(), rel=1e-6)]


def said(body: dict[str, Any], asked: dict[str, Any]) -> Any:
    if kind(asked) == "score":
        return pytest.approx(body["probabilities"], rel=1e-4)
    if kind(asked) == "recommend":
        return [(one["id"], one["score"]) for one in body["results"][0]["tails"]]
    if kind(asked) == "neighbors":
        return [(one["id"], one["similarity"]) for one in body["results"][0]["neighbors"]]
    return body["embeddings"]


def test_a_promotion_and_a_rollback_under_load_lose_nothing_and_each_answer_is_its_releases(
    store: Store, service: ServiceProcess
) -> None:
    names = releases.names(store)
    models = {}
    for name in names:
        release = releases.read(store, name)
        models[name] = open_model(releases.opened(store, release), release.snapshot)
    before = samples(service.url)
    with Load(service.url) as load:

        def until(name: str) -> None:
            """Promote, and wait until a hundred requests in a row are answered from it by both workers."""
            releases.promote(store, name, "me", "test")
            deadline = time.monotonic() + 60
            while True:
                last = load.answers[-100:]
                if len(last) == 100 and all(one[2] and one[2]["release"] == name for one in last):
                    return
                assert time.monotonic() < deadline
                time.sleep(0.05)

        until(names[0])
        until(names[1])
        until(names[0])
    assert len(load.answers) >= 300
    assert Counter(status for _, status, _, _ in load.answers) == {200: len(load.answers)}
    for asked, _, body, headers in load.answers:
        assert headers["Twhin-Release"] == body["release"]
        assert said(body, asked) == expected(models[body["release"]], asked)
    assert {body["release"] for _, _, body, _ in load.answers} == set(names)
    after = samples(service.url)
    for endpoint in ("recommend", "neighbors", "score", "embedding"):
        count = sum(kind(asked) == endpoint for asked, *_ in load.answers)
        of_endpoint = f'twhin_requests_total{{endpoint="/{endpoint}"'
        assert total(after, of_endpoint) - total(before, of_endpoint) == count  # of both workers together
        seen = f'twhin_request_seconds_count{{endpoint="/{endpoint}"}}'
        assert after[seen] - before.get(seen, 0) == count
    assert after["twhin_swaps_total"] - before["twhin_swaps_total"] == 4  # two changes of two workers
    current = releases.current(store)
    assert current is not None
    assert after[f'twhin_release_workers{{release="{current.name}",snapshot="{current.snapshot}"}}'] == 2


def workers(service: ServiceProcess) -> list[psutil.Process]:
    found = psutil.Process(service.process.pid).children()
    alive = [one for one in found if one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in alive if "spawn_main" in " ".join(one.cmdline())]


def test_workers_map_the_same_files_and_hold_no_copy_of_the_vectors(service: ServiceProcess) -> None:
    mapped = []
    for worker in workers(service):
        tables = [one for one in worker.memory_maps(grouped=False) if one.path.endswith("vectors.npy")]
        assert tables and all(one.private_dirty == 0 and "w" not in one.perms for one in tables)
        mapped.append({one.path for one in tables})
    assert len(mapped) == 2 and mapped[0] == mapped[1]


@pytest.mark.long  # who is killed while it is asked for a sign of life is noticed after 15 s
def test_a_worker_that_dies_is_replaced_and_what_it_counted_stays(service: ServiceProcess) -> None:
    httpx.get(f"{service.url}/healthz")
    before = samples(service.url)
    opened = service.log().count("answering from release")
    victim, other = workers(service)
    victim.kill()
    deadline = time.monotonic() + 60
    while service.log().count("answering from release") == opened:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert httpx.get(f"{service.url}/readyz").status_code == 200
    assert other.is_running() and len(workers(service)) == 2
    after = samples(service.url)
    name = 'twhin_requests_total{endpoint="/healthz",status="200"}'
    assert after[name] >= before[name] >= 1
    assert total(after, "twhin_release_workers") == 2  # the dead one is not counted any more


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_stop_lets_requests_in_flight_end_and_exits_with_0(store: Store, number: signal.Signals) -> None:
    with serving(store.root) as service:
        with Load(service.url, clients=2) as load:
            while len(load.answers) < 50:
                time.sleep(0.02)
            before = len(load.answers)
            assert service.stop(number) == 0, service.log()
        assert "Traceback" not in service.log()
    statuses = [str(status) for _, status, _, _ in load.answers]
    assert set(statuses[:before]) == {"200"}
    # From the stop on one client may be refused, or reset where it waited, while the other's answer is under way: no
    # answer is cut off, and none says an error.
    refused_by = ("Connect", "disconnected", "ReadError", "WriteError", "reset")
    refused = [one for one in statuses[before:] if one != "200"]
    assert all(any(word in one for word in refused_by) and "complete" not in one for one in refused), refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_arguments(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_address_beyond_loopback_without_a_key_is_refused(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TWHIN_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "some.host.example"):
        line = refused(capsys, "--home", store.root, "--host", host, "--port", "0")
        assert host in line and "an API key is needed" in line and "--api-key-file" in line
    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.write_text("\n")
    short.write_text("secret\n")
    for file, message in ((empty, "has no API key"), (short, "at least 16"), (tmp_path / "none", "cannot be read")):
        line = refused(capsys, "--home", store.root, "--host", "0.0.0.0", "--port", "0", "--api-key-file", str(file))
        assert message in line and str(file) in line and "secret" not in line
    monkeypatch.setenv("TWHIN_API_KEY", "")
    assert "TWHIN_API_KEY: has no API key" in refused(capsys, "--home", store.root, "--port", "0")


def test_a_port_that_is_in_use_is_refused_with_the_remedy(
    store: Store, service: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    port = service.url.rsplit(":", 1)[1]
    line = refused(capsys, "--home", store.root, "--port", port)
    assert f"127.0.0.1:{port}" in line and "choose another --port" in line


def test_a_key_is_enough_to_bind_beyond_loopback_and_loopback_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TWHIN_API_KEY", raising=False)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_access(ServeOptions("home", host=host))
    (tmp_path / "key").write_text(KEY)
    check_access(ServeOptions("home", host="0.0.0.0", api_key_file=str(tmp_path / "key")))
    monkeypatch.setenv("TWHIN_API_KEY", KEY)
    check_access(ServeOptions("home", host="::"))


def test_workers_ask_for_the_key_and_no_log_or_command_line_has_it(service: ServiceProcess) -> None:
    asked = {"entity": "user", "id": USERS[0]}
    assert httpx.get(f"{service.url}/embedding", params=asked).status_code == 401
    assert httpx.get(f"{service.url}/embedding", params=asked, headers=WITH_KEY).status_code == 200
    assert KEY not in service.log()
    assert not any(KEY in " ".join(worker.cmdline()) for worker in workers(service))
