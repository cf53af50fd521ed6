"""A training as a JobSet: manifests against the published schemas, and its life against a stand-in for a cluster."""

from __future__ import annotations

import copy
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_kubernetes
import pytest
import yaml
from fake_kubernetes import FakeKubernetes
from helpers import SNAPSHOT, planted_config, write_config, write_planted
from kubeflow_trainer_api.models import IoK8sApiCoreV1ConfigMap, JobsetV1alpha2JobSet

from twhin_pipeline.config import TwhinConfig, load_config
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.launchers import kubernetes, printed, submit
from twhin_pipeline.launchers.job import Training
from twhin_pipeline.launchers.kubernetes import KubernetesJob, manifests
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch
from twhin_pipeline.training.launch import Failure
from twhin_pipeline.training.reporting import record_line

EVERYTHING = {
    "image": "registry.example/twhin:1", "namespace": "ml", "service_account": "trainer", "secret": "store-keys",
    "resources": {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 8}, "node_selector": {"pool": "gpu"},
    "labels": {"kueue.x-k8s.io/queue-name": "research"}, "volumes": {"data": "/data"},
}  # fmt: skip


def config_of(nodes: int = 2, **section: Any) -> TwhinConfig:
    asked = {"image": "twhin:1", **section}
    return planted_config(launch={"kind": "kubernetes", "nnodes": nodes, "nproc_per_node": 1, "kubernetes": asked})


def training(config: TwhinConfig, folder: Path, store: Store | None = None) -> Training:
    return Training(
        write_config(config, folder), store or Store("memory://bucket"), SNAPSHOT, ("training.num_epochs=3",)
    )


def valid(config_map: dict[str, Any], job_set: dict[str, Any]) -> bool:
    """Tell whether manifests are what the schemas describe: nothing is lost or changed when their models read them."""
    models = ((IoK8sApiCoreV1ConfigMap, config_map), (JobsetV1alpha2JobSet, job_set))
    return all(model.from_dict(copy.deepcopy(value)).to_dict() == value for model, value in models)


@pytest.mark.parametrize("section", [{}, EVERYTHING], ids=["least", "everything"])
def test_the_manifests_fit_the_published_schemas(section: dict[str, Any], tmp_path: Path) -> None:
    config_map, job_set = manifests(config := config_of(**section), made := training(config, tmp_path))
    assert valid(config_map, job_set)
    wrong = copy.deepcopy(job_set)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["restartpolicy"] = "Never"
    assert not valid(config_map, wrong), "a field that the schema does not know is noticed"
    text = printed.text(config, made.config_path, made.overrides, made.store, SNAPSHOT)
    assert list(yaml.safe_load_all(text)) == [config_map, job_set]


def test_each_node_gets_a_pod_with_what_the_section_says_and_the_first_ones_address(tmp_path: Path) -> None:
    config_map, job_set = manifests(config := config_of(3, **EVERYTHING), made := training(config, tmp_path))
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (3, 3, "Indexed")
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    command = container["command"]
    assert command[command.index("--endpoint") + 1] == f"{made.name}-train-0-0.{made.name}:29400"
    assert command[command.index("--home") + 1] == made.store.root
    assert container["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8"}
    assert container["envFrom"] == [{"secretRef": {"name": "store-keys"}}]
    assert {"name": "claim-data", "mountPath": "/data"} in container["volumeMounts"]
    assert (pod["serviceAccountName"], pod["nodeSelector"]) == ("trainer", {"pool": "gpu"})
    assert job_set["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    (tmp_path / "seen.yaml").write_text(config_map["data"]["config.yaml"])
    assert load_config(str(tmp_path / "seen.yaml")).model_dump() == config.model_dump()
    assert len(f"{made.name}-train-0-65535") <= 63, "a host's name"


def test_nothing_secret_of_the_environment_is_in_the_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-secret")
    made = manifests(config := config_of(), training(config, tmp_path))
    env = {one["name"]: one["value"] for one in container(made)["env"]}
    assert env == {"PYTHONUNBUFFERED": "1", "MLFLOW_RUN_ID": "abc", "MLFLOW_TRACKING_URI": "https://mlflow.example"}
    assert "secret" not in json.dumps(made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:pass@mlflow.example")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI holds a password.*launch\.kubernetes\.secret"):
        manifests(config, training(config, tmp_path))


def container(made: list[dict[str, Any]]) -> dict[str, Any]:
    spec = made[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return dict(spec["containers"][0])


def test_pods_are_not_sent_to_files_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    local = Store(str(tmp_path / "home"))
    with pytest.raises(UserError, match=r"pods cannot read the store .* TWHIN_HOME"):
        manifests(config := config_of(), training(config, tmp_path, local))
    env = {one["name"] for one in container(manifests(config, training(config, tmp_path)))["env"]}
    assert "TWHIN_NO_TRACKING" in env, "MLflow's file is on this machine"
    mounted = config_of(volumes={"data": str(tmp_path)})
    env = {one["name"] for one in container(manifests(mounted, training(mounted, tmp_path, local)))["env"]}
    assert "TWHIN_NO_TRACKING" not in env


@contextmanager
def served(
    tmp_path: Path, command: Callable[[list[str], int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeKubernetes]:
    fake = FakeKubernetes(command)
    with fake_kubernetes.serve(tmp_path, fake) as kubeconfig:
        # The client reads the variable when it is imported, so it is given the file where it looks then.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setattr(kubernetes, "ASK_S", 0.1)
        yield fake


def shell(*scripts: str) -> Callable[[list[str], int], list[str]]:
    """Let the pod of each number run a shell script, the last one for all further pods."""
    return lambda _, index: ["bash", "-c", scripts[min(index, len(scripts) - 1)]]


def outcome(tmp_path: Path, stop: threading.Event | None = None, stop_s: float = 30) -> Failure | None:
    config = config_of()
    job = KubernetesJob(config, training(config, tmp_path))
    return submit.follow(job, submit.Relay(None, set()), stop or threading.Event(), stop_s)


def test_a_jobsets_lines_are_shown_live_and_its_end_is_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go_on = tmp_path / "go-on"
    script = f"echo one; while [ ! -e {go_on} ]; do sleep .05; done; echo two; sleep .3"
    real = submit.emit

    def emit(line: str) -> None:
        real(line)
        if line == "one":
            go_on.touch()  # the pod goes on only when its first line was seen

    monkeypatch.setattr(submit, "emit", emit)
    with served(tmp_path, shell(script, "true"), monkeypatch) as fake:
        fake.waiting = "ImagePullBackOff"
        threading.Timer(0.6, lambda: setattr(fake, "waiting", "")).start()
        assert outcome(tmp_path) is None
    shown = capsys.readouterr().out.splitlines()
    assert shown.index("one") < shown.index("two") and shown.count("one") == 1
    assert any("waits (ImagePullBackOff)" in line for line in shown)
    (name,) = fake.config_maps
    assert fake.config_maps[name]["metadata"]["ownerReferences"][0]["uid"] == fake.job_sets[name]["metadata"]["uid"]


def test_the_failure_of_another_pod_is_the_cause_where_it_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(kind: str, when: int) -> str:
        fields = {"rank": -1, "kind": kind, "message": "m", "traceback": f"the traceback of {kind}", "when": when}
        (tmp_path / kind).write_text(record_line("failure", fields))
        return f"cat {tmp_path / kind}; exit 1"

    with served(tmp_path, shell(failing("RuntimeError", 20), failing("ValueError", 10)), monkeypatch):
        found = outcome(tmp_path)
    assert found is not None and (found.kind, found.traceback) == ("ValueError", "the traceback of ValueError")


@pytest.mark.parametrize(("code", "pods"), [(1, 3), (2, 2)])
def test_a_lost_pod_comes_back_and_is_followed_but_not_after_a_mistake_of_the_user(
    code: int, pods: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f"if [ -e {tmp_path}/lost ]; then echo back again; sleep .3; else touch {tmp_path}/lost; exit {code}; fi"
    config = config_of()
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"max_restarts": 1})})
    with served(tmp_path, shell(script, "sleep 1"), monkeypatch) as fake:
        job = KubernetesJob(config, training(config, tmp_path))
        found = submit.follow(job, submit.Relay(None, set()), threading.Event())
        assert len(fake.pods) == pods
    assert (found is None, "back again" in capsys.readouterr().out) == (code == 1, code == 1)


def test_a_pod_that_dies_without_a_word_is_named_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, shell("sleep .2", "exit 137"), monkeypatch):
        found = outcome(tmp_path)
    assert found is not None and "train-0-1-abcde: Error, exit code 137" in found.message


@pytest.mark.parametrize("obeys", [True, False])
def test_a_signal_deletes_the_jobset_and_pods_that_do_not_end_are_ended(
    obeys: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "trap 'echo checkpoint; exit 75' TERM; " if obeys else "trap '' TERM; "
    stop = threading.Event()
    real = submit.emit

    def emit(line: str) -> None:
        real(line)
        if line == "ready":  # the trap is set
            stop.set()

    monkeypatch.setattr(submit, "emit", emit)
    with served(tmp_path, shell(script + "echo ready; while true; do sleep .05; done"), monkeypatch) as fake:
        found = outcome(tmp_path, stop, stop_s=20 if obeys else 0.5)
        assert not fake.job_sets and not fake.pods
    assert found is not None and found.kind == "TrainingCancelled"
    killed = ("DELETE", f"{fake_kubernetes.CORE}/pods") in fake.requests
    assert killed is not obeys


def test_a_refusal_of_the_api_server_and_a_jobset_that_runs_already_are_the_users_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, shell("sleep 30"), monkeypatch) as fake:
        fake.forbidden = True
        with pytest.raises(UserError, match=r'refuses the training: .* "ann" cannot create'):
            outcome(tmp_path)
        fake.forbidden = False
        config = config_of()
        KubernetesJob(config, training(config, tmp_path)).start()
        with pytest.raises(UserError, match=r"trains this already.*kubectl delete jobset"):
            outcome(tmp_path)


def test_no_cluster_is_one_line_that_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match=r"needs a cluster: .*set KUBECONFIG") as error:
        outcome(tmp_path)
    assert "\n" not in str(error.value)


def test_a_cluster_without_jobset_and_one_that_is_away_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, shell("true"), monkeypatch):
        monkeypatch.setattr(kubernetes, "PLURAL", "others")
        with pytest.raises(UserError, match=r"is JobSet's controller on the cluster\?"):
            outcome(tmp_path)
    with pytest.raises(UnavailableError, match="does not answer"):
        outcome(tmp_path)


def test_a_jobset_that_has_ended_makes_room_for_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path, shell("true"), monkeypatch) as fake:
        assert outcome(tmp_path) is None
        assert outcome(tmp_path) is None
    posts = [path for method, path in fake.requests if method == "POST" and path == fake_kubernetes.JOBSETS]
    assert len(posts) == 2


@pytest.mark.long
def test_the_command_of_the_manifest_trains_on_two_pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(volumes={"data": str(tmp_path)})
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    path = write_config(config, tmp_path)

    def command(container: list[str], _: int) -> list[str]:
        """What image, ConfigMap and network would do."""
        words = {"python": sys.executable, "/etc/twhin/config.yaml": path, "/tmp/twhin-logs": str(tmp_path / "logs")}
        return [f"127.0.0.1:{port}" if "-train-0-0." in word else words.get(word, word) for word in container]

    lines: list[str] = []
    with served(tmp_path, command, monkeypatch):
        launch.run(config, path, [], store, SNAPSHOT, output=lines.append, log_dir=str(tmp_path / "submitter"))
    assert store.manifest("twhin_model", SNAPSHOT).details["world_size"] == 2
    assert any("step 48 of 48" in line for line in lines)
