"""A failed run and a release that a gate held back are told to the webhook, each with its cause."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
from dagster_tables import SNAPSHOT

from twhin_pipeline._dagster.assets import releases, sensors
from twhin_pipeline.store import Store
from twhin_pipeline.words import PROMOTION


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


@pytest.mark.parametrize("decision", ["held", "promoted"])
def test_a_release_that_a_gate_held_back_is_told_with_the_reason(webhook, tmp_path, decision):
    store = Store(str(tmp_path))
    with store.replace(PROMOTION, SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.table({"gate": ["new"], "about": ["item"], "passed": [False], "limit": [0.5], "text": ["60 %"]}))
        draft.details = {
            "release": "2025-01-01-b", "decision": decision, "reason": "60 % of its ids are new", "by": "me",
            "current_before": "2024-12-31-a",
        }  # fmt: skip

    @dg.asset(key=PROMOTION)
    def promotion(context):
        step: Any = SimpleNamespace(store=store)
        context.add_output_metadata(releases.promotion_page(step, store.manifest(PROMOTION, SNAPSHOT)))

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([promotion], instance=instance, tags={"dagster/partition": SNAPSHOT})
        [done] = [one for one in result.all_events if one.event_type is dg.DagsterEventType.RUN_SUCCESS]
        context = dg.build_run_status_sensor_context("alert_held", done, instance, result.dagster_run)
        sensors.alert_held(context)
    if decision == "promoted":
        assert not webhook
        return
    [message] = webhook
    assert message["run_id"] == result.run_id and message["snapshot"] == SNAPSHOT
    assert "2025-01-01-b is held by a gate: 60 % of its ids are new; 2024-12-31-a stays current" in message["text"]
