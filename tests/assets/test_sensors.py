"""A failed run is told to the webhook, with its cause."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import dagster as dg
import pytest
from dagster_tables import SNAPSHOT

from twhin_pipeline._dagster.assets import sensors


@pytest.fixture
def webhook(monkeypatch):
    """A server that keeps what is posted to it."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(sensors.WEBHOOK_ENV, f"http://127.0.0.1:{server.server_port}/")
    yield got
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_failed_run_is_told_with_its_cause(webhook):
    @dg.op
    def breaks() -> None:
        raise dg.Failure("out of eggs")

    @dg.job
    def fails() -> None:
        breaks()

    with dg.DagsterInstance.ephemeral() as instance:
        result = fails.execute_in_process(instance=instance, raise_on_error=False, tags={"dagster/partition": SNAPSHOT})
        context = dg.build_run_status_sensor_context(
            "alert", result.get_run_failure_event(), instance, result.dagster_run
        ).for_run_failure()
        sensors.alert(context)
    [message] = webhook
    assert message["run_id"] == result.run_id and message["snapshot"] == SNAPSHOT
    assert "out of eggs" in message["text"] and "breaks" in message["text"]
