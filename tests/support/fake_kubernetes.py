"""The few endpoints of a Kubernetes API server that a launcher needs, on 127.0.0.1, with pods that are processes here.

It stands in for the API server, JobSet's controller, and the kubelet: a created JobSet becomes processes that run the
container's command, their output is the pods' log, and deleting it sends them SIGTERM. It knows nothing of images,
volumes or networks, so what it shows of a real cluster ends there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

NAMESPACE = "team"
JOBSETS = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{NAMESPACE}/jobsets"
CORE = f"/api/v1/namespaces/{NAMESPACE}"


class Pod:
    """A process in the place of a pod."""

    def __init__(self, job_set: str, index: int, command: list[str], env: dict[str, str]) -> None:
        """Start it."""
        self.name, self.job_set, self.index = f"{job_set}-train-0-{index}-abcde", job_set, index
        self.log: list[tuple[str, str]] = []
        self.process = subprocess.Popen(
            command, env={**env, "JOB_COMPLETION_INDEX": str(index)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}{len(self.log) % 1000:03d}Z"
            self.log.append((now, line.rstrip("\n")))

    def as_dict(self, waiting: str) -> dict[str, Any]:
        """Return it as the API has it."""
        code = None if waiting else self.process.poll()
        state: dict[str, Any] = {"running": {}}
        phase = "Running"
        if waiting:
            phase, state = "Pending", {"waiting": {"reason": waiting}}
        elif code is not None:
            phase = "Failed" if code else "Succeeded"
            state = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
        return {
            "metadata": {
                "name": self.name, "labels": {"jobset.sigs.k8s.io/jobset-name": self.job_set},
                "annotations": {"batch.kubernetes.io/job-completion-index": str(self.index)},
            },
            "spec": {"nodeName": f"machine-{self.index}", "containers": [{"name": "train"}]},
            "status": {
                "phase": phase,
                "containerStatuses": [
                    {"name": "train", "image": "", "imageID": "", "ready": True, "restartCount": 0, "state": state}
                ],
            },
        }  # fmt: skip


@dataclass
class FakeKubernetes:
    """What the server holds and was asked."""

    command: Callable[[list[str], int], list[str]]
    """Makes the command of a pod's process from the container's, and the pod's number."""
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    waiting: str = ""
    """A reason for which containers wait; empty: they run."""
    forbidden: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    job_sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    config_maps: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: list[Pod] = field(default_factory=list)

    def create(self, job_set: dict[str, Any]) -> dict[str, Any]:
        """Take a JobSet and start its pods."""
        name = job_set["metadata"]["name"]
        job_set["metadata"]["uid"] = f"uid-{len(self.requests)}"
        self.job_sets[name] = job_set
        for replicated in job_set["spec"]["replicatedJobs"]:
            spec = replicated["template"]["spec"]
            container = spec["template"]["spec"]["containers"][0]
            env = {**self.env, **{one["name"]: one["value"] for one in container["env"]}}
            for index in range(spec["completions"]):
                self.pods.append(Pod(name, index, self.command(container["command"], index), env))
        return job_set

    def look(self, name: str) -> dict[str, Any] | None:
        """Return a JobSet with its status, as its controller would have it; None where it is gone."""
        job_set = self.job_sets.get(name)
        if job_set is None:
            return None
        pods = [pod for pod in self.pods if pod.job_set == name]
        codes = [pod.process.poll() for pod in pods]
        if "deletionTimestamp" in job_set["metadata"] and None not in codes:
            del self.job_sets[name]
            self.pods = [pod for pod in self.pods if pod.job_set != name]
            return None
        if any(codes):
            job_set["status"] = {"terminalState": "Failed"}
        elif None not in codes:
            job_set["status"] = {"terminalState": "Completed"}
        return job_set

    def delete(self, name: str) -> None:
        """Let the pods of a JobSet end; it is gone when they are."""
        self.job_sets[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        for pod in self.pods:
            if pod.job_set == name and pod.process.poll() is None:
                pod.process.send_signal(signal.SIGTERM)


@contextmanager
def serve(folder: Path, fake: FakeKubernetes) -> Iterator[Path]:
    """Serve until the block ends; yield a kubeconfig."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def error(self, status: int, message: str) -> None:
            self.answer({"kind": "Status", "status": "Failure", "message": message, "code": status}, status)

        def body(self) -> Any:
            return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")

        def do_POST(self) -> None:
            path, body = urlsplit(self.path).path, self.body()
            fake.requests.append(("POST", path))
            if fake.forbidden:
                self.error(403, 'jobsets.jobset.x-k8s.io is forbidden: User "ann" cannot create resource "jobsets"')
            elif path == JOBSETS:
                self.answer(fake.create(body), 201)
            elif path == f"{CORE}/configmaps":
                fake.config_maps[body["metadata"]["name"]] = body
                self.answer(body, 201)
            else:
                self.error(404, f"no {path}")

        def do_DELETE(self) -> None:
            path = urlsplit(self.path).path
            self.body()
            fake.requests.append(("DELETE", path))
            if path == f"{CORE}/pods":
                for pod in fake.pods:
                    if pod.process.poll() is None:
                        pod.process.kill()
            else:
                fake.delete(path.rpartition("/")[2])
            self.answer({"kind": "Status", "status": "Success"})

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            options = {key: values[0] for key, values in parse_qs(url.query).items()}
            name = url.path.rpartition("/")[2]
            if url.path.startswith(f"{JOBSETS}/"):
                found = fake.look(name)
                self.answer(found) if found is not None else self.error(404, f"jobsets {name!r} not found")
            elif url.path == f"{CORE}/pods":
                items = [pod.as_dict(fake.waiting) for pod in fake.pods]
                self.answer({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
            elif url.path.endswith("/log"):
                self.log(url.path.split("/")[-2], options)
            elif pod := next((pod for pod in fake.pods if pod.name == name), None):
                self.answer(pod.as_dict(fake.waiting))
            else:
                self.error(404, f"no {url.path}")

        def log(self, name: str, options: dict[str, str]) -> None:
            pod = next((pod for pod in fake.pods if pod.name == name), None)
            if pod is None:
                return self.error(404, f"pods {name!r} not found")
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            sent = 0
            while True:
                ended = not pod.reader.is_alive()
                for when, line in pod.log[sent:]:
                    text = f"{when} {line}\n" if options.get("timestamps") else f"{line}\n"
                    data = text.encode()
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    sent += 1
                if ended or not options.get("follow"):
                    break
                time.sleep(0.02)
            self.wfile.write(b"0\r\n\r\n")
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = folder / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
                "users": [{"name": "ann", "user": {}}],
                "contexts": [{"name": "test", "context": {"cluster": "c", "user": "ann", "namespace": NAMESPACE}}],
                "current-context": "test",
            }
        )
    )
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()
        for pod in fake.pods:
            if pod.process.poll() is None:
                pod.process.kill()
            pod.process.wait()
