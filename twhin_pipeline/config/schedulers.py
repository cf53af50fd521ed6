"""What a cluster's scheduler is asked for, where it starts the training (`launch.kind`)."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from twhin_pipeline.config.base import Section

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class SlurmConfig(Section):
    """What `sbatch` is asked for, besides `launch.nnodes`. Left out, each is the cluster's default."""

    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account that is charged."""
    time: str | None = None
    """Limit of time, such as `12:00:00`. Two minutes before it, ranks write a checkpoint and end."""
    gpus_per_node: int | None = Field(None, ge=1, le=1_024)
    """GPUs of each node."""
    cpus_per_node: int | None = Field(None, ge=1, le=65_536)
    """CPUs of each node. Many clusters give one where this is left out."""
    sbatch: list[str] = []
    """More options of sbatch, each a line such as `--constraint=a100`."""
    setup: list[str] = []
    """Shell lines before the training, such as `module load cuda`."""

    @field_validator("partition", "account", "time")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.:,@+-]+", value):
            raise ValueError(f"{value!r} is no name or time that sbatch takes: it has a space or a special sign")
        return value

    @field_validator("sbatch")
    @classmethod
    def _options(cls, lines: list[str]) -> list[str]:
        for line in lines:
            if not re.fullmatch(r"--?[a-zA-Z][^\n]*", line):
                raise ValueError(f"{line!r} is no option of sbatch; give lines such as --constraint=a100")
        return lines

    @field_validator("setup")
    @classmethod
    def _lines(cls, lines: list[str]) -> list[str]:
        if any("\n" in line for line in lines):
            raise ValueError("a line break in an item; give each shell line as an item")
        return lines


class KubernetesConfig(Section):
    """The pods that train, one a node. The cluster must have JobSet's controller."""

    image: str
    """Image that has this package with the extra `train`, and `python` on its path."""
    namespace: str | None = None
    """Namespace. Left out: that of the kubeconfig's context, else `default`."""
    context: str | None = None
    """Context of the kubeconfig. Left out: the current one, or, in a pod, the pod's own service account."""
    service_account: str | None = None
    """Service account of the pods."""
    secret: str | None = None
    """Name of a Secret whose keys become environment variables, such as the object store's credentials."""
    resources: dict[str, int | str] = {}
    """What each pod requests and is limited to, such as `{cpu: 8, memory: 64Gi, nvidia.com/gpu: 8}`."""
    node_selector: dict[str, str] = {}
    """Labels of the machines to run on."""
    labels: dict[str, str] = {}
    """Labels of the JobSet, such as a queue's name for Kueue."""
    volumes: dict[str, str] = {}
    """Persistent volume claims, each with the path at which pods see it. A store in a folder must be below one."""

    @field_validator("namespace", "service_account", "secret")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not all(DNS_LABEL.fullmatch(part) for part in value.split(".")):
            raise ValueError(f"{value!r} is no name of Kubernetes: lower-case letters, digits and hyphens")
        return value

    @field_validator("volumes")
    @classmethod
    def _mounts(cls, volumes: dict[str, str]) -> dict[str, str]:
        for claim, path in volumes.items():
            if not DNS_LABEL.fullmatch(claim) or not path.startswith("/"):
                raise ValueError(f"{claim}: {path!r}: give a claim's name with an absolute path, such as data: /data")
        return volumes
