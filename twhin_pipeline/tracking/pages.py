"""Where the pages of Dagster, MLflow and the explorer are, for links between them."""

from __future__ import annotations

import os
from urllib.parse import urlencode

DAGSTER, MLFLOW = "http://127.0.0.1:3000", "http://127.0.0.1:5000"
"""Where `make ui` serves them, unless it is told other ports."""
SERVICE = "http://127.0.0.1:8000"
"""Where `twhin serve` is, unless it is told another address or port."""
MODEL_TRAINING = "workflowType=machine_learning"
"""In an address of MLflow's pages, shows its menus for model training; without it, those for language models."""
DAGSTER_ENV, MLFLOW_ENV, SERVICE_ENV = "TWHIN_DAGSTER_URL", "TWHIN_MLFLOW_URL", "TWHIN_SERVICE_URL"


def dagster() -> str:
    """Return the address of Dagster's pages: TWHIN_DAGSTER_URL, else that of `make ui`."""
    return (os.environ.get(DAGSTER_ENV) or DAGSTER).rstrip("/")


def mlflow(tracking_uri: str = "") -> str:
    """Return the address of MLflow's pages: TWHIN_MLFLOW_URL, else the tracking server's, else that of `make ui`."""
    if variable := os.environ.get(MLFLOW_ENV):
        return variable.rstrip("/")
    return tracking_uri.rstrip("/") if tracking_uri.startswith(("http://", "https://")) else MLFLOW


def explorer(release: str = "", service: str = "") -> str:
    """Return the address of a release in the explorer: at `service`, else TWHIN_SERVICE_URL, else the usual place.

    Without a release it is the current one's.
    """
    base = (service or os.environ.get(SERVICE_ENV) or SERVICE).rstrip("/")
    return f"{base}/explore/" + (f"?{urlencode({'release': release})}" if release else "")
