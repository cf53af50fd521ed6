"""MLflow: runs and the model registry."""

from twhin_pipeline.tracking.registry import pointer, register_model
from twhin_pipeline.tracking.runs import (
    EXPERIMENT,
    QuietRun,
    Run,
    allowed_name,
    artifact_root,
    experiment_id,
    finite,
    log_evaluation,
    open_run,
    resume_run,
    run_exists,
    start_run,
    uri,
)

__all__ = [
    "EXPERIMENT",
    "QuietRun",
    "Run",
    "allowed_name",
    "artifact_root",
    "experiment_id",
    "finite",
    "log_evaluation",
    "open_run",
    "pointer",
    "register_model",
    "resume_run",
    "run_exists",
    "start_run",
    "uri",
]
