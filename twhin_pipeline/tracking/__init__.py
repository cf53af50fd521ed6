"""MLflow: runs and the model registry. A server that is away holds nothing up: see `server` and `outbox`."""

from twhin_pipeline.tracking.outbox import resolved
from twhin_pipeline.tracking.registry import aliased, note_removed, pointer, register_model, set_champion
from twhin_pipeline.tracking.runs import (
    EXPERIMENT,
    QuietRun,
    Run,
    allowed_name,
    begin,
    experiment_id,
    find_run,
    finite,
    log_evaluation,
    open_run,
    resume_run,
    run_exists,
    send,
    start_run,
)
from twhin_pipeline.tracking.server import artifact_root, check, is_off, reason, uri

__all__ = [
    "EXPERIMENT",
    "QuietRun",
    "Run",
    "aliased",
    "allowed_name",
    "artifact_root",
    "begin",
    "check",
    "experiment_id",
    "find_run",
    "finite",
    "is_off",
    "log_evaluation",
    "note_removed",
    "open_run",
    "pointer",
    "reason",
    "register_model",
    "resolved",
    "resume_run",
    "run_exists",
    "send",
    "set_champion",
    "start_run",
    "uri",
]
