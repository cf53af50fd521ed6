"""MLflow as a Dagster resource: the run of a training is made here, in Dagster's process, and ended here.

What belongs here: a run's life, and the links between it and Dagster's run. What does not: what training logs
(`twhin_pipeline/tracking/`); it goes on with this run in its own processes.
https://mlflow.org/docs/latest/tracking
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError
from pydantic import Field

from twhin_pipeline import tracking
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.store import Store
from twhin_pipeline.tracking import pages, server


class TrackingResource(dg.ConfigurableResource):
    """MLflow: MLFLOW_TRACKING_URI where it is set, else SQLite in the store."""

    mlflow_url: str = Field(
        default="",
        description=f"Where MLflow's pages are, for links. Empty: the environment variable {pages.MLFLOW_ENV}, which "
        f"`make ui` sets, else MLFLOW_TRACKING_URI where it is a web address, else {pages.MLFLOW}.",
    )
    dagster_url: str = Field(
        default="",
        description="Where Dagster's pages are, for MLflow's link back. Empty: the environment variable "
        f"{pages.DAGSTER_ENV}, which `make ui` sets, else {pages.DAGSTER}.",
    )
    service_url: str = Field(
        default="",
        description="Where `twhin serve` is, for links to its explorer. Empty: the environment variable "
        f"{pages.SERVICE_ENV}, else {pages.SERVICE}.",
    )

    def uri(self, store: Store) -> str:
        """Return the tracking URI."""
        return tracking.uri(store)

    def link(self, store: Store, run_id: str) -> dg.MetadataValue:
        """Return a link to a run's page in MLflow; its id alone where MLflow does not answer."""
        run_id = tracking.resolved(store, run_id)
        try:
            experiment = server.within(server.limit_s(store), lambda: tracking.experiment_id(store))
        except Exception:
            return dg.MetadataValue.text(run_id)
        return self._page(store, f"experiments/{experiment}/runs/{run_id}")

    def model_link(self, store: Store, model_uri: str) -> dg.MetadataValue:
        """Return a link to a registered version's page in MLflow; `model_uri` is `models:/<name>/<version>`."""
        name, _, version = model_uri.removeprefix("models:/").rpartition("/")
        return self._page(store, f"models/{name}/versions/{version}")

    def explorer_link(self, release: str) -> dg.MetadataValue:
        """Return a link to a release in the explorer of `twhin serve`."""
        return dg.MetadataValue.url(pages.explorer(release, self.service_url))

    def _page(self, store: Store, path: str) -> dg.MetadataValue:
        base = self.mlflow_url.rstrip("/") or pages.mlflow(self.uri(store))
        return dg.MetadataValue.url(f"{base}/#/{path}?{pages.MODEL_TRAINING}")

    @contextmanager
    def run(
        self, context: dg.AssetExecutionContext, store: Store, snapshot: str, config: TwhinConfig
    ) -> Iterator[tracking.Run | tracking.QuietRun]:
        """Yield the MLflow run of this step: FINISHED when the block ends well, else KILLED (cancelled) or FAILED.

        A retry of the step goes on with the run of the attempt before.
        """
        (key,) = context.selected_asset_keys
        asset = key.to_user_string()
        tags = {"dagster.run_id": context.run.run_id, "dagster.asset": asset, "dagster.partition": snapshot}
        page = f"{self.dagster_url.rstrip('/') or pages.dagster()}/runs/{context.run.run_id}"
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

    @staticmethod
    def _attempt_before(store: Store, tags: dict[str, str]) -> str | None:
        try:
            return tracking.find_run(store, tags)
        except Exception:  # a server that is away does not end a training
            return None
