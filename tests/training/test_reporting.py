"""Reports of training: lines for people, records for the programs that ask for them."""

from __future__ import annotations

import pytest

from twhin_pipeline.training.reporting import (
    PROGRESS,
    RECORDS_ENV,
    VALIDATION,
    ConsoleReporter,
    ValidationRecord,
    parse_record,
)

RECORD = ValidationRecord(7, {"loss": 0.5, "filtered_hits@10": 0.25}, complete=True)


@pytest.mark.parametrize("wanted", [[], [PROGRESS], [VALIDATION], [PROGRESS, VALIDATION]])
def test_a_record_is_printed_where_its_kind_is_asked_for(wanted, monkeypatch, capsys):
    monkeypatch.setenv(RECORDS_ENV, ",".join(wanted))
    reporter = ConsoleReporter()
    reporter.milestone("validation at step 7: loss 0.5000")
    reporter.progress(7, 10, 0.5, 100.0)
    reporter.validation(RECORD)
    text, *lines = capsys.readouterr().out.rstrip("\n").split("\n")  # splitlines would split at the mark too
    assert text == "validation at step 7: loss 0.5000" and parse_record(text) is None
    assert [kind for kind, _ in map(parse_record, lines)] == wanted


def test_an_evaluation_comes_back_from_its_record_as_it_was(monkeypatch, capsys):
    monkeypatch.setenv(RECORDS_ENV, VALIDATION)
    ConsoleReporter().validation(RECORD)
    kind, values = parse_record(capsys.readouterr().out)
    assert kind == VALIDATION and ValidationRecord(**values) == RECORD
