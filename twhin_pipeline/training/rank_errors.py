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


def _record(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    file = Path(os.environ[ERROR_FILE_ENV])
    if not file.exists():  # torch's own handler has not recorded it
        text = "".join(traceback.format_exception(kind, error, trace))
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        file.write_text(
            json.dumps({"message": {"message": f"{kind.__name__}: {error}", "extraInfo": extra}}), encoding="utf-8"
        )
    sys.__excepthook__(kind, error, trace)
