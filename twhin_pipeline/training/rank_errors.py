"""Errors that end a rank before `train.main` records them, such as a library that cannot be loaded.

Imports the standard library alone: it must work where nothing else can be imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

ERROR_FILE_ENV = "TORCHELASTIC_ERROR_FILE"
"""torchrun sets it in each rank: where it looks for the rank's error."""


def record_uncaught() -> None:
    """Write an uncaught error of this rank where the launcher looks for it; without torchrun nothing changes."""
    if ERROR_FILE_ENV in os.environ:
        sys.excepthook = _record


def end_if_mistaken() -> None:
    """End this process with the user's mistake that this node met before torchrun started it again, if any.

    To try again does not mend a mistake; libraries would load for seconds to find it anew.
    """
    attempt, file = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0), os.environ.get(ERROR_FILE_ENV)
    if not attempt or not file:
        return
    run = Path(file).parents[2]
    for other in sorted(run.glob(f"attempt_{attempt - 1}/*/{Path(file).name}")):
        try:
            text = other.read_text(encoding="utf-8")
            message = json.loads(text)["message"]
        except (OSError, ValueError, KeyError):
            continue
        told = message["message"] if isinstance(message, dict) else str(message)
        if told.startswith("UserError: "):
            Path(file).write_text(text, encoding="utf-8")
            sys.exit(2)


def _record(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    file = Path(os.environ[ERROR_FILE_ENV])
    if not file.exists():  # torch's own handler has not recorded it
        text = "".join(traceback.format_exception(kind, error, trace))
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        file.write_text(
            json.dumps({"message": {"message": f"{kind.__name__}: {error}", "extraInfo": extra}}), encoding="utf-8"
        )
    sys.__excepthook__(kind, error, trace)
