"""A server of S3 on this machine (moto's), for tests, with listings in short pages, and faults on demand."""

from __future__ import annotations

import atexit
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

SECRET = "not-a-secret-f3b1"
PAGE = 7
"""Objects in a page of a listing; S3's are of 1,000."""
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass
class Server:
    """A running server: its URL, the requests that it got, and what is done to them first."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method, and path with query."""
    fault: Callable[[dict[str, Any]], tuple[str, str] | None] | None = None
    """Returns the status and the code of an error to answer a request with, and nothing is done; None: none."""
    lost_answer: Callable[[dict[str, Any]], bool] | None = None
    """Tells whether a request is done, and its answer is lost: the client gets an error, and tries again."""
    ignores_conditions: bool = False

    @property
    def env(self) -> dict[str, str]:
        """The environment by which clients find it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self) -> str:
        """Make a bucket; return its name."""
        import boto3

        client = boto3.client(
            "s3", endpoint_url=self.url, aws_access_key_id="tester", aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )  # fmt: skip
        name = f"b{uuid.uuid4().hex}"
        client.create_bucket(Bucket=name)
        return name


@contextmanager
def serving(host: str = "127.0.0.1") -> Iterator[Server]:
    """Run a server at an address of this machine. Each request is answered as a whole before the next, as S3's are."""
    os.environ.setdefault("MOTO_S3_DEFAULT_MAX_KEYS", str(PAGE))
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log_request(self, *_: Any) -> None:
            """Print nothing."""

    inner = DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()

    def failing(start: Callable[..., Any], status: str, code: str) -> Iterable[bytes]:
        start(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>".encode()]

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"] + (f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else "")
        server.requests.append((environ["REQUEST_METHOD"], path))
        if server.fault is not None and (answer := server.fault(environ)) is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return failing(start, *answer)
        if server.ignores_conditions:
            environ = {k: v for k, v in environ.items() if k not in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")}
        lost = server.lost_answer is not None and server.lost_answer(environ)
        with one_at_a_time:
            if lost:
                list(inner(environ, lambda *_: None))
                return failing(start, "500 Internal Server Error", "InternalError")
            return list(inner(environ, start))

    made = make_server(host, 0, application, threaded=True, request_handler=Quiet)
    server = Server(f"http://{host}:{made.server_port}")
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


_used: list[str] = []


@cache
def shared() -> Server:
    """Return this process's server on the loopback address; it ends with the process."""
    context = serving()
    atexit.register(context.__exit__, None, None, None)
    return context.__enter__()


def use(monkeypatch: Any, server: Server | None = None) -> str:
    """Let this process and those that it starts find a server; return the URL of a new bucket of it."""
    server = server or shared()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    import s3fs

    if _used[-1:] != [server.url]:  # its clients are kept, since making one takes a quarter of a second
        s3fs.S3FileSystem.clear_instance_cache()
        _used.append(server.url)
    return f"s3://{server.bucket()}"
