"""MLflow as a Dagster resource: the run of a training is made here, in Dagster's process, and ended here.

What belongs here: a run's life, and the links between it and Dagster's run. What does not: what training logs
(`twhin_pipeline/tracking/`); it goes on with this run in its own processes.
https://mlflow.org/docs/latest/tracking
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError
from pydantic import Field

from twhin_pipeline import tracking
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.store import Manifest, Store


class TrackingResource(dg.ConfigurableResource):
    """MLflow: MLFLOW_TRACKING_URI where it is set, else SQLite in the store."""

    mlflow_url: str = Field(
        default="http://127.0.0.1:5000",
        description="Where MLflow's pages are, for links, where MLFLOW_TRACKING_URI is no web address (`make mlflow`).",
    )
    dagster_url: str = Field(
        default="http://127.0.0.1:3000", description="Where Dagster's pages are, for MLflow's link back (`make ui`)."
    )

    def uri(self, store: Store) -> str:
        """Return the tracking URI."""
        return tracking.uri(store)

    def link(self, store: Store, run_id: str) -> dg.MetadataValue:
        """Return a link to a run's page in MLflow."""
        uri = self.uri(store)
        base = uri.rstrip("/") if uri.startswith(("http://", "https://")) else self.mlflow_url
        return dg.MetadataValue.url(f"{base}/#/experiments/{tracking.experiment_id(store)}/runs/{run_id}")

    @contextmanager
    def run(
        self, context: dg.AssetExecutionContext, store: Store, snapshot: str, config: TwhinConfig
    ) -> Iterator[tracking.Run]:
        """Yield the MLflow run of this step: FINISHED when the block ends well, else KILLED (cancelled) or FAILED.

        A retry of the step goes on with the run of the attempt before.
        """
        asset = context.asset_key.to_user_string()
        tags = {"dagster.run_id": context.run.run_id, "dagster.asset": asset, "dagster.partition": snapshot}
        page = f"{self.dagster_url}/runs/{context.run.run_id}"
        note = f"Trained by [Dagster run {context.run.run_id[:8]}]({page}), asset `{asset}`, snapshot {snapshot}."
        links = {"dagster.url": page, "mlflow.note.content": note}
        started = self._attempt_before(store, tags) if context.retry_number else None
        if started is None:
            run = tracking.start_run(store, snapshot, config, {**tags, **links})
        else:
            run = tracking.resume_run(store, started)
        try:
            yield run
        except DagsterExecutionInterruptedError:
            run.finish("KILLED")
            raise
        except BaseException:
            run.finish("FAILED")
            raise
        run.finish()

    def log_metrics(self, store: Store, model: Manifest, metrics: Mapping[str, float]) -> None:
        """Add metrics to the run that trained a model, where the tracking store has it."""
        run_id = model.details.get("mlflow_run_id")
        if run_id and tracking.run_exists(store, run_id):
            run = tracking.resume_run(store, run_id, owned=False)
            run.log_metrics(_there(metrics), int(model.details.get("steps", 0)))

    def register(self, store: Store, snapshot: str) -> dict[str, dg.MetadataValue]:
        """Register a snapshot's model with the metrics of its evaluation; return what to show."""
        model = store.manifest("twhin_model", snapshot)
        run_id = model.details.get("mlflow_run_id")
        if not run_id or not tracking.run_exists(store, run_id):
            return {"mlflow_model": dg.MetadataValue.text(f"not registered: no run of this model at {self.uri(store)}")}
        metrics = store.manifest("evaluation", snapshot).details["metrics"]
        uri = tracking.register_model(store, snapshot, _there(metrics))
        return {"mlflow_model": dg.MetadataValue.text(uri), "mlflow_run": self.link(store, run_id)}

    @staticmethod
    def _attempt_before(store: Store, tags: dict[str, str]) -> str | None:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=tracking.uri(store))
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = client.search_runs([tracking.experiment_id(store)], wanted, max_results=1)
        return str(found[0].info.run_id) if found else None


def _there(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics that have a value, by names that MLflow takes."""
    return {tracking.allowed_name(name): float(value) for name, value in metrics.items() if value is not None}
