"""`make demo`: materializes every asset of a snapshot by `dagster asset materialize`, then shows `twhin summary`.

Dagster logs each event, thousands of them. They go to a file; what a person wants to see is printed: stages, their
milestones, failed checks and errors.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

# Packages of the bundled graph that many people know; the summary shows what lies near them.
WELL_KNOWN = "package:firefox-esr,postgresql,nginx,gimp,r-base"

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+ - dagster - (?P<level>[A-Z]+) - (?P<rest>.*)$")
# Job, run id, then either "pid - step - EVENT - text" or, for a log line, "step - text".
EVENT = re.compile(r"^\S+ - [0-9a-f-]{36} - \d+ - (?:(?P<step>\S+) - )?(?P<event>[A-Z_]+) - (?P<text>.*)$")
LOG = re.compile(r"^\S+ - [0-9a-f-]{36} - (?P<step>\S+) - (?P<text>.*)$")
CHECK = re.compile(r"Asset check '(?P<check>[^']+)' on '(?P<asset>[^']+)' (?P<how>passed|did not pass)")
NAMED = re.compile(r'"(?P<step>[^"]+)" in (?P<time>.+?)\.?$')


class Digest:
    """Dagster's log lines in, lines for a person out (`None`: nothing to show)."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.passed = 0
        self.failed = 0
        self.showing_error = False
        self.told_where = False

    def line(self, text: str) -> str | None:
        """Take one line of the log."""
        stamp = STAMP.match(text)
        if stamp is None:
            # What follows an error's first line belongs to it.
            return f"    {text}" if self.showing_error and text.strip() else None
        self.showing_error = False
        level, rest = stamp["level"], stamp["rest"]
        event = EVENT.match(rest)
        if event is None:
            return self._log(level, rest)
        if level in ("ERROR", "CRITICAL"):
            # The run's own failure repeats the step's.
            self.showing_error = event["event"] != "RUN_FAILURE"
            return f"  ✗ {event['text']}"
        return self._event(event["event"], event["step"] or "", event["text"])

    def _event(self, event: str, step: str, text: str) -> str | None:
        if event == "ASSET_MATERIALIZATION":
            if step not in self.made:
                self.made.append(step)
        elif event == "ASSET_CHECK_EVALUATION" and (check := CHECK.search(text)):
            if check["how"] == "passed":
                self.passed += 1
            else:
                self.failed += 1
                return f"  ! check {check['check']} of {check['asset']} did not pass{text[check.end() :]}"
        elif event == "STEP_SUCCESS" and step in self.made and (named := NAMED.search(text)):
            self.made.remove(step)
            return f"  ✓ {named['step']} ({named['time']})"
        elif event == "STEP_WORKER_STARTING" and self.made:
            # Dagster sometimes loses the last line of a step's process; the next step tells that it ended well.
            return f"  ✓ {self.made.pop(0)}"
        return None

    def _log(self, level: str, rest: str) -> str | None:
        log = LOG.match(rest)
        if level == "DEBUG" or log is None or log["text"].startswith("[pipes]"):
            return None
        if log["text"].startswith("snapshot "):  # each stage says where it reads and writes; once is enough here
            if self.told_where:
                return None
            self.told_where = True
        if log["text"].startswith("Dependencies for step"):  # follows from the failure that was shown
            return None
        if level in ("ERROR", "CRITICAL"):
            self.showing_error = True
            return f"  ✗ {log['step']}: {log['text']}"
        return f"    {log['step']}: {log['text']}"


def materialize(snapshot: str, log_path: Path) -> int:
    """Run Dagster and show its digest. Returns Dagster's exit code."""
    digest = Digest()
    started = time.perf_counter()
    dagster = str(Path(sys.executable).parent / "dagster")
    command = [dagster, "asset", "materialize", "-m", "twhin_pipeline.definitions", "--select", "*"]
    process = subprocess.Popen(
        [*command, "--partition", snapshot],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"},
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    with log_path.open("w", encoding="utf-8") as log:
        try:
            for raw in process.stdout:
                log.write(raw)
                log.flush()
                if (shown := digest.line(raw.rstrip("\n"))) is not None:
                    print(f"[{time.perf_counter() - started:5.0f} s]{shown}", flush=True)
            code = process.wait()
        except KeyboardInterrupt:  # Dagster had it too, and ends the training processes
            code = process.wait() or 130
    failed = f", {digest.failed} did not pass" if digest.failed else ""
    print(f"[{time.perf_counter() - started:5.0f} s]  {digest.passed} checks passed{failed}; full log: {log_path}")
    return code


def main() -> int:
    """Run the demonstration and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--snapshot", default="2025-08-09")
    parser.add_argument("--examples", default=WELL_KNOWN, help="ENTITY:ID,ID,… for the summary")
    arguments = parser.parse_args()
    home = os.environ.get("TWHIN_HOME", ".twhin")
    logs = Path(".twhin" if "://" in home else home) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log_path = logs / f"demo-{datetime.now():%Y%m%dT%H%M%S}.log"
    config = os.environ.get("TWHIN_CONFIG") or "configs/debian.yaml"
    print(f"Configuration {config}, store {home}")
    print(f"Materializing snapshot {arguments.snapshot}: edges, vocabularies, training set, model, evaluation, vectors")
    code = materialize(arguments.snapshot, log_path)
    if code:
        print(f"The run failed. Its cause is above, and everything in {log_path}; `make demo` tries again.")
        return code
    print(flush=True)
    command = [sys.executable, "-m", "twhin_pipeline.cli", "summary", "--snapshot", arguments.snapshot]
    if not os.environ.get("TWHIN_CONFIG"):
        command += ["--config", "debian", "--examples", arguments.examples]
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main())
