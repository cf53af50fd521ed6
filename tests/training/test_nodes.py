"""Several nodes train together with nothing in common but an object store, and one that is lost may come back."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import network_nodes
import pytest
import s3_server
from helpers import SNAPSHOT, planted_config, write_config, write_planted
from network_nodes import Network
from patience import wait_for

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.training import launch, nodes, rank_errors

without_namespaces = cache(network_nodes.reason_against)


def several(**fields: object) -> TwhinConfig:
    return planted_config(launch={"nproc_per_node": 1, "nnodes": 2, "rdzv_endpoint": "127.0.0.1:29400", **fields})


@dataclass
class Training:
    """One training by the nodes of a network."""

    network: Network
    server: s3_server.Server
    store: Store
    overrides: tuple[str, ...]
    runs: list[tuple[int, Path]] = field(default_factory=list)

    def start(self, node: int) -> Callable[[], int]:
        """Start `twhin train` on a node as a user would; return what waits for its end and returns its exit code."""
        log = self.network.folders[node].parent / f"node-{node}-{len(self.runs)}.log"
        self.runs.append((node, log))
        folder = self.network.folders[node]
        folder.mkdir(exist_ok=True)
        path = write_config(planted_config(launch={"nproc_per_node": 1}), folder)
        sets = [
            f"launch.nnodes={len(self.network.folders)}", f"launch.node_rank={node}",
            f"launch.rdzv_endpoint={self.network.address(0)}:29400", *self.overrides,
        ]  # fmt: skip
        command = [sys.executable, "-m", "twhin_pipeline.cli", "train", "-c", path, "--snapshot", SNAPSHOT]
        command += [word for one in sets for word in ("--set", one)]
        env = {**self.server.env, "TWHIN_HOME": self.store.root, "TWHIN_NO_TRACKING": "1", "OMP_NUM_THREADS": "1"}
        with log.open("w") as output:
            process = self.network.start(node, command, env, output)
        return process.wait

    def said(self, number: int) -> str:
        """Return what the run of that number has printed so far."""
        return self.runs[number][1].read_text()

    def all(self) -> str:
        """Return what all runs printed, for messages."""
        return "\n".join(f"--- node {node}\n{path.read_text()[-6000:]}" for node, path in self.runs)

    def model(self) -> Manifest:
        """Return the model's manifest."""
        return self.store.manifest("twhin_model", SNAPSHOT)


def bits(manifest: Manifest) -> dict[str, str]:
    """Return the checksums of a model's vectors and operators."""
    return {f["path"]: f["sha256"] for f in manifest.files if f["path"].startswith(("tables/", "relations"))}


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Training]]:
    """Makes trainings of one graph; each has a network and a store of its own."""
    if (why := without_namespaces()) is not None:
        pytest.skip(why)
    from contextlib import ExitStack

    with ExitStack() as stack:

        def make(count: int, *overrides: str) -> Training:
            base = tmp_path / f"network-{len(list(tmp_path.iterdir()))}"
            base.mkdir()
            network = stack.enter_context(Network.of(count, base))
            server = stack.enter_context(s3_server.serving(network.here))
            store = Store(f"{s3_server.use(monkeypatch, server)}/home")
            write_planted(store, planted_config())
            return Training(network, server, store, overrides)

        yield make


def test_two_nodes_that_share_nothing_but_an_object_store_train_one_model(
    trainings: Callable[..., Training],
) -> None:
    training = trainings(2, "training.num_epochs=2", "launch.join_timeout_s=120")
    joined, first = training.start(1), training.start(0)
    assert (first(), joined()) == (0, 0), training.all()
    manifest = training.model()
    shards = {file["path"] for file in manifest.files if file["path"].startswith("tables/user/")}
    assert shards == {f"tables/user/part-0000{rank}.parquet" for rank in (0, 1)}, "each node wrote its rows"
    assert manifest.details["world_size"] == 2 and "ranks exchange vectors" in training.said(1)
    # It waited for node 0, took part, and left the rest to it.
    assert "waits for node 0" in training.said(0) and "node 1 has taken part" in training.said(0)
    verdict = training.store.verdict("twhin_model", SNAPSHOT, manifest.version)
    assert verdict is not None and verdict.accepted
    logs = training.store.sizes(training.store.path("logs", "train", SNAPSHOT))
    assert {name.split("/")[0] for name in logs} == {"node-0", "node-1"}
    assert not training.store.is_written("twhin_model", SNAPSHOT)


LONG = (
    "training.num_epochs=20", "training.checkpoint_every_n=20", "training.train_log_every_n=16",
    "training.num_eval_steps=0", "launch.max_restarts=3",
)  # fmt: skip
"""Without validation the model is that of the last step, which all others lead to."""


def _mid(training: Training, number: int) -> None:
    """Wait until a run has written two checkpoints and goes on."""
    wait_for(lambda: "step 48 " in training.said(number), 120, "the training is on its way")


@pytest.fixture
def undisturbed(trainings: Callable[..., Training]) -> Callable[[int], dict[str, str]]:
    """Trains without any disturbance, and returns the bits of the model."""

    def train(count: int) -> dict[str, str]:
        training = trainings(count, *LONG)
        waits = [training.start(node) for node in range(count)]
        assert [wait() for wait in waits] == [0] * count, training.all()
        return bits(training.model())

    return train


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_loses_its_power_and_comes_back_changes_no_bit(
    trainings: Callable[..., Training], undisturbed: Callable[[int], dict[str, str]], lost: int
) -> None:
    training = trainings(2, *LONG)
    waits = [training.start(0), training.start(1)]
    _mid(training, 0)
    if lost == 1:  # without a word: the other waits in a step, until it comes back
        training.network.cut(lost)
    training.network.started[lost].kill()
    waits[lost]()
    training.network.mend(lost)
    waits[lost] = training.start(lost)
    assert [wait() for wait in waits] == [0, 0], training.all()
    assert any("resumed from step" in training.said(number) for number in range(len(training.runs)))
    assert bits(training.model()) == undisturbed(2)


@pytest.mark.long
def test_a_cable_that_is_pulled_for_a_while_delays_three_nodes_and_changes_no_bit(
    trainings: Callable[..., Training], undisturbed: Callable[[int], dict[str, str]]
) -> None:
    """Longer than torchrun waits for a node's sign of life (15 s): the connections outlive it."""
    training = trainings(3, *LONG)
    waits = [training.start(node) for node in range(3)]
    _mid(training, 0)
    training.network.cut(2)
    before = training.said(0)
    time.sleep(25)
    assert training.said(0).count("step ") <= before.count("step ") + 2, "nobody goes on alone"
    training.network.mend(2)
    assert [wait() for wait in waits] == [0, 0, 0], training.all()
    assert "resumed from step" not in training.said(0)
    assert bits(training.model()) == undisturbed(3)


def test_a_node_without_the_first_one_waits_and_then_says_where_it_looked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = several(node_rank=1, rdzv_endpoint=f"127.0.0.1:{port}", join_timeout_s=0.2)
    with pytest.raises(UnavailableError, match=rf"no training at 127.0.0.1:{port} within 0.2 s; .*launch.join_timeout"):
        launch.check_meeting(config)
    assert f"node 1 waits for node 0 at 127.0.0.1:{port}" in capsys.readouterr().out


def test_node_0_has_rank_0_whatever_the_addresses_are() -> None:
    """torchrun numbers ranks by the nodes' names for themselves; MLflow and the locks are where rank 0 is."""
    names = [nodes.label(several(nnodes=20_000, node_rank=node, rdzv_endpoint="zulu:1")) for node in (0, 1, 2, 11_111)]
    assert names == sorted(names) and names[0] == "zulu"


@pytest.mark.parametrize("endpoint", [":29400", "a:", "a:b"])
def test_an_endpoint_of_another_form_is_refused(endpoint: str) -> None:
    with pytest.raises(UserError, match=r"launch.rdzv_endpoint: .* host:port"):
        nodes.endpoint(several(rdzv_endpoint=endpoint))


def test_ranks_of_several_nodes_speak_by_the_interface_that_leads_to_the_first() -> None:
    for node in (0, 1):
        assert nodes.interface(several(node_rank=node)) == "lo"
    assert nodes.interface(several(node_rank=1, rdzv_endpoint="no-such-host.invalid:1")) is None


def test_of_ranks_that_were_started_again_the_last_failure_is_the_cause(tmp_path: Path) -> None:
    for attempt, message in enumerate(["RuntimeError: Connection closed by peer", "ValueError: the cause"]):
        file = tmp_path / "run" / f"attempt_{attempt}" / "0" / "error.json"
        file.parent.mkdir(parents=True)
        file.write_text(f'{{"message": "{message}"}}')
    found = launch.first_failure(str(tmp_path))
    assert found is not None and found.kind == "ValueError"


@pytest.mark.parametrize(("kind", "ends"), [("UserError", True), ("UnavailableError", False), ("RuntimeError", False)])
def test_a_rank_that_is_started_again_after_a_users_mistake_ends_with_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ends: bool
) -> None:
    files = [tmp_path / f"attempt_{attempt}" / "1" / "error.json" for attempt in (0, 1)]
    for file in files:
        file.parent.mkdir(parents=True)
    files[0].write_text(f'{{"message": {{"message": "{kind}: no such table"}}}}')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(files[1]))
    if ends:
        with pytest.raises(SystemExit, match="2"):
            rank_errors.end_if_mistaken()
        assert files[1].read_text() == files[0].read_text()
    else:
        rank_errors.end_if_mistaken()
        assert not files[1].exists()
