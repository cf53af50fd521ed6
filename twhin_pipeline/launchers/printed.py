"""What a job would be submitted as, for people: to read it, to change it, or to submit it by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence

import yaml

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.launchers import kubernetes, slurm
from twhin_pipeline.launchers.job import Training
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch


def text(config: TwhinConfig, config_path: str, overrides: Sequence[str], store: Store, snapshot: str) -> str:
    """Return the batch script for Slurm, or the manifests for Kubernetes as YAML.

    Raises:
        UserError: `launch.kind` is `local`, or pods could not read the store.
    """
    training = Training(config_path, store, snapshot, tuple(overrides))
    if config.launch.kind == "slurm":
        path = config_path if "://" in config_path else os.path.abspath(config_path)
        log_dir = os.path.abspath(launch.default_log_dir(store, snapshot))
        return slurm.script(config, training, path, "twhin-%j.out", log_dir).rstrip()
    if config.launch.kind == "kubernetes":
        return yaml.safe_dump_all(kubernetes.manifests(config, training), sort_keys=False).rstrip()
    raise UserError("launch.kind is local, so nothing is submitted; add --set launch.kind=slurm, or kubernetes")
