"""The launcher as a Dagster resource: how many processes train, on how many nodes, and how they meet.

What belongs here: what differs between a laptop, CI and a cluster. What does not: what a rank does
(`twhin_pipeline/training/train.py`), or torchrun's command line (`twhin_pipeline/training/launch.py`).
https://docs.dagster.io/guides/build/external-pipelines
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import dagster as dg
from pydantic import Field

from twhin_pipeline.config import TwhinConfig, as_override, load_config, relations
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch

REPORTER = "twhin_pipeline._dagster.resources.pipes:PipesReporter"
TERMINATION_TIMEOUT_S = 60.0
"""Above torchrun's own grace of 30 s, within which ranks write their checkpoint."""


class LauncherResource(dg.ConfigurableResource):
    """A training under Dagster Pipes: torchrun here, or a job at a scheduler (`kind`).

    What is set here rules over the configuration's `launch`.
    """

    kind: str | None = Field(
        default=None, description="Who starts the training: local, slurm or kubernetes. Empty: `launch.kind`."
    )

    nproc_per_node: int | None = Field(default=None, description="Ranks on a node. Empty: `launch.nproc_per_node`.")
    nnodes: int | None = Field(default=None, description="Nodes. Empty: `launch.nnodes`.")
    node_rank: int | None = Field(default=None, description="This node's number. Empty: `launch.node_rank`.")
    rdzv_endpoint: str | None = Field(
        default=None, description="host:port of the first node. Empty: `launch.rdzv_endpoint`."
    )
    env: dict[str, str] = Field(default={}, description="Environment variables of the ranks, over `launch.env`.")

    def overrides(self, overrides: Sequence[str]) -> list[str]:
        """Return `overrides` and, after them, what is set here."""
        fields = ("kind", "nproc_per_node", "nnodes", "node_rank", "rdzv_endpoint")
        ours = [f"launch.{field}={getattr(self, field)}" for field in fields if getattr(self, field) is not None]
        return [*overrides, *ours]

    def train(
        self,
        context: dg.AssetExecutionContext,
        config_path: str,
        overrides: Sequence[str],
        store: Store,
        snapshot: str,
        tracking_env: Mapping[str, str],
    ) -> dg.MaterializeResult:
        """Train where `launch.kind` says and return what rank 0 reported.

        Raises:
            UserError: A rank met a mistake of the user's.
            dagster.Failure: Anything else; its description is the traceback of the rank that failed first.
        """
        # Private in Dagster, and the one name for "the process ended with an error".
        from dagster._core.errors import DagsterPipesExecutionError

        overrides = self.overrides(overrides)
        if load_config(config_path, overrides).launch.kind == "kubernetes":  # pods do not inherit our environment
            overrides += [as_override(f"launch.env.{name}", value) for name, value in self.env.items()]
        config: TwhinConfig = relations.resolve(load_config(config_path, overrides), store, snapshot)
        launch.check_meeting(config)
        log_dir = f"{launch.default_log_dir(store, snapshot)}/{context.run.run_id}-{context.retry_number}"
        log_dir += f"-{store.view}" if store.view else ""
        command = launch.command(config, config_path, store, snapshot, log_dir, overrides)
        env = {
            **launch.environment(config),
            **self.env,
            "TWHIN_REPORTER": REPORTER,
            **tracking_env,
        }
        client = dg.PipesSubprocessClient(termination_timeout_seconds=TERMINATION_TIMEOUT_S)
        context.log.info(f"ranks' logs: {log_dir}")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*expected_writer_count.*")
                done = client.run(context=context, command=command, env=env)
        except DagsterPipesExecutionError as error:
            raise self.failure(log_dir, str(error)) from None
        finally:
            launch.keep_logs(store, snapshot, config, log_dir)
        if not done.get_results(implicit_materializations=False):
            raise dg.Failure(
                "training ended without an error and reported nothing; see the ranks' logs",
                metadata={"logs": dg.MetadataValue.path(log_dir)},
            )
        return done.get_materialize_result()

    @staticmethod
    def failure(log_dir: str, ended: str) -> Exception:
        """Return the exception to raise for a launch that failed: the cause, not the echoes of other ranks."""
        cause = launch.first_failure(log_dir)
        if cause is not None and (mistake := launch.mistake_of(cause)) is not None:
            return mistake
        metadata: dict[str, dg.MetadataValue] = {"logs": dg.MetadataValue.path(log_dir)}
        if cause is None:
            return dg.Failure(f"torchrun failed and no rank told why ({ended}); see the ranks' logs", metadata)
        metadata["traceback"] = dg.MetadataValue.md(f"```\n{cause.traceback}\n```")
        if cause.rank < 0:  # the job as a whole, or a rank that the traceback names with its node
            return dg.Failure(cause.words, metadata)
        metadata["failing_rank"] = dg.MetadataValue.int(cause.rank)
        return dg.Failure(f"rank {cause.rank} failed: {cause.kind}: {cause.message}\n\n{cause.traceback}", metadata)
