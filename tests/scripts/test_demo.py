"""`make demo` shows a person stages, milestones, failed checks and errors, out of Dagster's thousands of lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from demo import Digest

RUN = "2038cbcf-15b1-43bd-8c32-69ef69952180"


def event(kind: str, step: str, text: str, level: str = "DEBUG") -> str:
    return f"2026-11-21 09:43:44 +0000 - dagster - {level} - __ASSET_JOB - {RUN} - 9508 - {step} - {kind} - {text}"


def log(step: str, text: str, level: str = "INFO") -> str:
    return f"2026-11-21 09:43:44 +0000 - dagster - {level} - __ASSET_JOB - {RUN} - {step} - {text}"


def shown(*lines: str) -> list[str]:
    digest = Digest()
    return [text for line in lines if (text := digest.line(line)) is not None]


MADE = event("ASSET_MATERIALIZATION", "edges", "Materialized value raw_edges.")


def test_a_stage_that_made_a_table_is_shown_once():
    success = event("STEP_SUCCESS", "edges", 'Finished execution of step "edges" in 1.3s.')
    following = event("STEP_WORKER_STARTING", "edges_checks", 'Launching subprocess for "edges_checks".')
    assert shown(MADE, MADE, success, following) == ["  ✓ edges (1.3s)"]


def test_a_stage_whose_last_line_dagster_lost_is_shown_when_the_next_starts():
    following = event("STEP_WORKER_STARTING", "edges_checks", 'Launching subprocess for "edges_checks".')
    assert shown(MADE, following, following) == ["  ✓ edges"]


@pytest.mark.parametrize(
    "line",
    [
        event("STEP_START", "edges", 'Started execution of step "edges".'),
        event("STEP_SUCCESS", "edges_checks", 'Finished execution of step "edges_checks" in 2s.'),
        log("edges", "a detail", level="DEBUG"),
        "a line that is none of Dagster's",
    ],
)
def test_noise_is_left_out(line):
    assert shown(line) == []


def test_milestones_are_shown():
    assert shown(log("twhin_model", "step 20 of 640  loss 6.0")) == ["    twhin_model: step 20 of 640  loss 6.0"]


def test_failed_checks_and_errors_are_shown_with_what_belongs_to_them():
    lines = [
        event("ASSET_CHECK_EVALUATION", "c", "Asset check 'good' on 'raw_edges' passed."),
        event("ASSET_CHECK_EVALUATION", "c", "Asset check 'bad' on 'raw_edges' did not pass. Description: 'no'"),
        event("STEP_FAILURE", "c", 'Execution of step "c" failed.', level="ERROR"),
        "",
        "SomeError: the cause",
        event("STEP_START", "d", 'Started execution of step "d".'),
        "a line that does not belong to the error",
    ]
    assert shown(*lines) == [
        "  ! check bad of raw_edges did not pass. Description: 'no'",
        '  ✗ Execution of step "c" failed.',
        "    SomeError: the cause",
    ]
