"""The processes: one binds the address and keeps the workers alive, which all accept from the same socket.

uvicorn's supervisor does it, also for one worker: it starts a worker anew that has died, and passes a stop on, so that
requests in flight end first.
"""

from __future__ import annotations

import os
import socket
import tempfile
import warnings
from functools import partial
from typing import Any

from twhin_pipeline.errors import UserError
from twhin_pipeline.serving.options import ServeOptions, check_access

SILENT_S = 15
"""Seconds that a worker may give no sign of life before it is replaced: on a busy machine it loads libraries for long.
One that is killed at the moment it is asked is noticed only after them."""
GRACE_S = 2
"""Seconds beyond the time limit that requests in flight have when the service is stopped."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
FORMAT = "%(asctime)s %(levelname)s %(process)d %(message)s"
LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": FORMAT}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
        "twhin": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


def serve(options: ServeOptions) -> None:
    """Serve until a signal ends it (SIGTERM, or ctrl-c).

    Raises:
        UserError: The address cannot be bound, or would be open to other machines without a key.
    """
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    check_access(options)
    with tempfile.TemporaryDirectory(prefix="twhin-serve-") as metrics, bind(options) as listening:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
        for name in THREAD_VARIABLES:  # each thread that computes is one thread of each library
            os.environ.setdefault(name, "1")
        config = uvicorn.Config(
            partial(_application, options),
            factory=True,
            workers=options.workers,
            log_config=LOGGING,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=int(options.time_limit) + GRACE_S,
            timeout_worker_healthcheck=SILENT_S,
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"twhin serve: http://{shown}:{port} answers from {options.home}", flush=True)
        Multiprocess(config, [listening]).run()


def bind(options: ServeOptions) -> socket.socket:
    """Return a socket that is bound to the address. Raises UserError where it cannot be."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        return socket.create_server(address[:2], family=family, backlog=2_048)
    except OSError as error:
        raise UserError(
            f"{options.host}:{options.port}: cannot be bound ({error.strerror}); choose another --port or --host"
        ) from error


def _application(options: ServeOptions) -> Any:
    """Make the application in a worker; the process that supervises does not load what it needs."""
    from twhin_pipeline.serving.app import create_app

    # Of ids that no training edge has: the log must have no ids, and Python keeps each such text.
    warnings.filterwarnings("ignore", category=UserWarning, module="twhin_pipeline")
    return create_app(options)
