"""Kubernetes: one JobSet a training, with one pod a node that runs torchrun.

JobSet gives pods names that the others can resolve, and ends all where one fails; its controller must be on the
cluster. Pods need no folder in common: the configuration comes in a ConfigMap, tables through the store's URL, and
logs through the API server. https://jobset.sigs.k8s.io/docs/concepts/
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from twhin_pipeline import extras, remote
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.configuration_file import LARGEST
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.launchers.job import FAILURE, State, Training
from twhin_pipeline.tracking import server
from twhin_pipeline.training.reporting import parse_record

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
PODS_OF = "jobset.sigs.k8s.io/jobset-name"
INDEX = "batch.kubernetes.io/job-completion-index"
"""The annotation and, in newer clusters, label with a pod's number in its job."""
PORT = 29400
CONFIG_DIR = "/etc/twhin"
LOGS = "/tmp/twhin-logs"
GRACE_S = 60
"""How long pods may take to end when the JobSet is deleted: torchrun gives its ranks 30 s for a checkpoint."""
KEPT_S = 86_400
"""How long a JobSet that has ended is kept, so that its logs can be read."""
ASK_S = 2.0
GONE_S = 180.0
READ = 50
"""Of so many failed pods the logs are searched for what failed first."""
TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PASSED_ON = ("MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI", "TWHIN_NO_TRACKING")


def manifests(config: TwhinConfig, training: Training) -> list[dict[str, Any]]:
    """Return the ConfigMap and the JobSet of a training, as `kubectl apply` takes them.

    Raises:
        UserError: Pods could not read the store, or a URL holds a password, which does not belong into a manifest.
    """
    asked = config.launch.kubernetes
    assert asked is not None
    name = training.name
    meta: dict[str, Any] = {"name": name, **({"namespace": asked.namespace} if asked.namespace else {})}
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": name}},
        # Ranks of a pod share tables there; a container has 64 MiB of it by default.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": CONFIG_DIR, "readOnly": True},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    for claim, path in asked.volumes.items():
        volumes.append({"name": f"claim-{claim}"[:63], "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{claim}"[:63], "mountPath": path})
    arguments = training.node_arguments(f"{CONFIG_DIR}/config.yaml")
    endpoint = f"{name}-train-0-0.{name}:{PORT}"
    resources = {key: str(value) for key, value in asked.resources.items()}
    container: dict[str, Any] = {
        "name": "train",
        "image": asked.image,
        "command": ["python", *arguments, "--log-dir", LOGS, "--endpoint", endpoint],
        "env": [{"name": key, "value": value} for key, value in _environment(config, training).items()],
        **({"envFrom": [{"secretRef": {"name": asked.secret}}]} if asked.secret else {}),
        **({"resources": {"requests": resources, "limits": resources}} if resources else {}),
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "containers": [container],
        "volumes": volumes,
        **({"serviceAccountName": asked.service_account} if asked.service_account else {}),
        **({"nodeSelector": asked.node_selector} if asked.node_selector else {}),
    }
    nodes = config.launch.nnodes
    job = {
        "completionMode": "Indexed", "completions": nodes, "parallelism": nodes, "backoffLimit": 0,
        "template": {"spec": pod},
    }  # fmt: skip
    text = remote.text(training.config_path, LARGEST, "a YAML file")
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"config.yaml": text}},
        {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "JobSet",
            "metadata": {**meta, **({"labels": asked.labels} if asked.labels else {})},
            "spec": {
                "failurePolicy": {"maxRestarts": 0},
                "ttlSecondsAfterFinished": KEPT_S,
                "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": job}}],
            },
        },
    ]


def _environment(config: TwhinConfig, training: Training) -> dict[str, str]:
    """Return the pods' variables besides those of the Secret. Raises UserError as `manifests` does."""
    asked = config.launch.kubernetes
    assert asked is not None
    if training.store.is_local and not _is_mounted(training.store.root, asked.volumes):
        raise UserError(
            f"pods cannot read the store {training.store.root}, a folder of this machine; put it behind a URL with "
            "TWHIN_HOME, or below the path of a claim in launch.kubernetes.volumes"
        )
    _no_password(training.store.root, "TWHIN_HOME")
    result = {"PYTHONUNBUFFERED": "1"}
    result |= {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    if server.is_off() or (asked.secret and not os.environ.get("MLFLOW_TRACKING_URI")):  # the Secret may have it
        return result
    uri = server.uri(training.store)
    path = server.sqlite_path(uri)
    if path is not None and not _is_mounted(str(path), asked.volumes):
        # A file of this machine: its runs are none of the pods'.
        result.pop("MLFLOW_RUN_ID", None)
        return {**result, "TWHIN_NO_TRACKING": "1"}
    _no_password(uri, "MLFLOW_TRACKING_URI")
    return {**result, "MLFLOW_TRACKING_URI": uri}


def _is_mounted(path: str, volumes: dict[str, str]) -> bool:
    return any(PurePosixPath(os.path.abspath(path)).is_relative_to(mount) for mount in volumes.values())


def _no_password(url: str, name: str) -> None:
    if "://" in url and urlsplit(url).password:
        raise UserError(
            f"{name} holds a password, which does not belong into a manifest; give the pods {name} and its credentials "
            "by a Secret, and name that in launch.kubernetes.secret"
        )


class KubernetesJob:
    """A training as a JobSet."""

    def __init__(self, config: TwhinConfig, training: Training) -> None:
        """Take what to train; `config` has `launch.kind: kubernetes`."""
        self.config, self.training, self.name = config, training, training.name
        self.namespace = "default"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None
        self._state, self._asked = State("waiting"), float("-inf")

    def start(self) -> str:
        """Create the JobSet and its ConfigMap.

        Raises:
            UserError: The package or a cluster is missing, pods could not read the store, the API server refuses the
                JobSet, or one of the same training runs.
            UnavailableError: The API server does not answer.
        """
        extras.need("kubernetes", "launch.kind: kubernetes")
        from kubernetes import client

        config_map, job_set = manifests(self.config, self.training)
        api = self._connect()
        self._core, self._custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        with _asking():
            self._make_room()
            made = self._custom.create_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, job_set)
            # Removed with the JobSet. Pods wait until it is there.
            owner = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "JobSet", "name": self.name}
            config_map["metadata"]["ownerReferences"] = [{**owner, "uid": made["metadata"]["uid"]}]
            try:
                self._core.create_namespaced_config_map(self.namespace, config_map)
            except client.ApiException as error:
                if error.status != 409:
                    raise
                self._core.replace_namespaced_config_map(self.name, self.namespace, config_map)
        return f"JobSet {self.name} in namespace {self.namespace}"

    def _connect(self) -> Any:
        """Return a client of the API server, and set the namespace."""
        from kubernetes import client
        from kubernetes import config as kube

        asked = self.config.launch.kubernetes
        assert asked is not None
        configuration = client.Configuration()
        try:
            kube.load_kube_config(context=asked.context, client_configuration=configuration)
            contexts, active = kube.list_kube_config_contexts()
            chosen = next((one for one in contexts if one["name"] == asked.context), active)
            namespace = chosen["context"].get("namespace")
        except kube.ConfigException as error:
            try:
                kube.load_incluster_config(client_configuration=configuration)
                namespace = (TOKEN / "namespace").read_text(encoding="utf-8").strip()
            except (kube.ConfigException, OSError):
                raise UserError(
                    f"launch.kind: kubernetes needs a cluster: {error}; set KUBECONFIG, or correct "
                    "launch.kubernetes.context"
                ) from None
        self.namespace = asked.namespace or namespace or "default"
        return client.ApiClient(configuration)

    def _make_room(self) -> None:
        """Wait until a JobSet of the same name is gone: one that has ended is deleted, one that runs is refused."""
        deadline = time.monotonic() + GONE_S
        while (found := self._found()) is not None:
            if "deletionTimestamp" not in found["metadata"]:
                if _outcome(found) is None:
                    raise UserError(
                        f"JobSet {self.name} in namespace {self.namespace} trains this already; wait for it, or end it "
                        f"with `kubectl delete jobset {self.name} -n {self.namespace}`"
                    )
                self._delete()
            if time.monotonic() > deadline:
                raise UnavailableError(f"an earlier JobSet {self.name} is still being deleted; try again later")
            time.sleep(0.5)

    def _found(self) -> dict[str, Any] | None:
        from kubernetes.client import ApiException

        try:
            found: dict[str, Any] = self._custom.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, self.name
            )
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        return found

    def lines(self) -> list[str]:
        """Return what the first pod printed since the last call, and, at the end, what other pods say failed."""
        result = []
        while not self._lines.empty():
            result.append(self._lines.get())
        return result

    def state(self) -> State:
        """Return where the JobSet is; the API server is asked every 2 s."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        if time.monotonic() - self._asked >= ASK_S and self._state.phase != "ended":
            self._asked = time.monotonic()
            try:
                self._state = self._look()
            except (ApiException, HTTPError) as error:
                reason = _reason(error) if isinstance(error, ApiException) else str(error)
                self._state = State(self._state.phase, f"cannot be looked at now: {reason}")
        return self._state

    def _look(self) -> State:
        found = self._found()
        leaving = found is not None and "deletionTimestamp" in found["metadata"]
        outcome = "deleted" if found is None else None if leaving else _outcome(found)
        pods = self._core.list_namespaced_pod(self.namespace, label_selector=f"{PODS_OF}={self.name}").items
        first, waits_for = next((pod for pod in pods if _index(pod) == 0), None), "no pod yet"
        if first is not None and first.status.phase == "Pending":
            waits_for, first = _waits_for(first), None
        if first is not None and self._reader is None:
            self._reader = threading.Thread(target=self._read, args=(first.metadata.name,), daemon=True)
            self._reader.start()
        if leaving:
            return State("running", "is being deleted")
        if outcome is None:
            if self._reader is None:
                return State("waiting", f"waits ({waits_for})")
            where = "" if first is None else f"runs, its first pod {first.metadata.name} on {first.spec.node_name}"
            return State("running", where)
        if self._reader is not None:
            self._reader.join(timeout=10)
        if outcome == "completed":
            return State("ended", "completed", succeeded=True)
        if outcome == "deleted":
            return State("ended", "was deleted; the same command trains again, from the last checkpoint")
        deaths = [(pod, _death(pod)) for pod in pods if _death(pod)]
        self._search([pod.metadata.name for pod, _ in deaths if _index(pod) != 0][:READ])
        why = "; ".join(f"pod {pod.metadata.name}: {death}" for pod, death in deaths[:3])
        return State("ended", f"failed ({why or _message(found)})")

    def _read(self, pod: str) -> None:
        """Pass a pod's log on until its container ends; a connection that breaks is made again where it was."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        last = ""
        while True:
            known = last
            try:
                for line in self._log(pod, follow=True, timestamps=True):
                    when, _, text = line.partition(" ")
                    if when > known:
                        last = when
                        self._lines.put(text)
                status = self._core.read_namespaced_pod(pod, self.namespace).status
                if status.phase not in ("Pending", "Running"):
                    return
            except ApiException as error:
                if error.status == 404:
                    return
            except HTTPError:
                pass
            time.sleep(1)

    def _search(self, pods: list[str]) -> None:
        """Pass on the records of failures in the logs of pods that were not followed."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        for pod in pods:
            try:
                for line in self._log(pod, tail_lines=200):
                    if (record := parse_record(line)) is not None and record[0] == FAILURE:
                        self._lines.put(line)
            except (ApiException, HTTPError):
                continue

    def _log(self, pod: str, **options: Any) -> Iterator[str]:
        response = self._core.read_namespaced_pod_log(
            pod, self.namespace, container="train", _preload_content=False, **options
        )
        rest = b""
        try:
            for chunk in response.stream(decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    yield line.decode("utf-8", errors="replace")
            if rest:
                yield rest.decode("utf-8", errors="replace")
        finally:
            response.release_conn()

    def stop(self) -> None:
        """Delete the JobSet: its pods get SIGTERM, and write a checkpoint within `GRACE_S`."""
        self._delete()
        self._asked = float("-inf")

    def kill(self) -> None:
        """Delete the pods without grace."""
        with _asking():
            self._core.delete_collection_namespaced_pod(
                self.namespace, label_selector=f"{PODS_OF}={self.name}", grace_period_seconds=0
            )

    def _delete(self) -> None:
        with _asking(may_be_gone=True):
            self._custom.delete_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, self.name, propagation_policy="Foreground"
            )


@contextmanager
def _asking(may_be_gone: bool = False) -> Iterator[None]:
    """Raise UserError where the API server refuses what the block asks, and UnavailableError where it is away."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if error.status == 404 and may_be_gone:
            return
        hint = "; is JobSet's controller on the cluster?" if error.status == 404 else ""
        raise UserError(f"Kubernetes refuses the training: {_reason(error)}{hint}") from error
    except HTTPError as error:
        raise UnavailableError(f"Kubernetes' API server does not answer ({error})") from error


def _outcome(job_set: dict[str, Any]) -> str | None:
    """Return `completed` or `failed`; None while the JobSet runs."""
    status = job_set.get("status", {})
    true = {one["type"] for one in status.get("conditions", []) if one["status"] == "True"}
    for name in ("Completed", "Failed"):
        if status.get("terminalState") == name or name in true:
            return name.lower()
    return None


def _message(job_set: dict[str, Any] | None) -> str:
    conditions = (job_set or {}).get("status", {}).get("conditions", [])
    return next(
        (one["message"] for one in conditions if one["type"] == "Failed" and one.get("message")), "no reason given"
    )


def _index(pod: Any) -> int | None:
    known = {**(pod.metadata.annotations or {}), **(pod.metadata.labels or {})}
    return int(known[INDEX]) if INDEX in known else None


def _waits_for(pod: Any) -> str:
    """Return why a pod does not run yet, in Kubernetes' words."""
    for status in pod.status.container_statuses or []:
        if status.state.waiting is not None:
            return ": ".join(filter(None, (status.state.waiting.reason, status.state.waiting.message)))
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message}"
    return str(pod.status.phase)


def _death(pod: Any) -> str:
    """Return how a pod's container failed, or the pod itself, such as by eviction; empty where it did not."""
    for status in pod.status.container_statuses or []:
        if status.state.terminated is not None and status.state.terminated.exit_code:
            return f"{status.state.terminated.reason}, exit code {status.state.terminated.exit_code}"
    if pod.status.phase == "Failed":
        return f"{pod.status.reason}: {pod.status.message}"
    return ""


def _reason(error: Any) -> str:
    """Return what the API server says of an error, in one line."""
    try:
        return " ".join(str(json.loads(error.body)["message"]).split())
    except (ValueError, KeyError, TypeError):
        return f"{error.status} {error.reason}"
