"""Which engine prepares the data: reads the source, numbers the entities, splits the edges and samples negatives."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import field_validator, model_validator

from twhin_pipeline.config.base import Section


class EngineConfig(Section):
    """Which engine prepares the data. Both write the same tables."""

    name: Literal["embedded", "spark"] = "embedded"
    """`embedded`: DuckDB and our own loops, in one process on one machine. `spark`: Apache Spark, on one machine or a
    cluster, for graphs that outgrow a machine (extra `spark`, and Java 17)."""
    master: str | None = None
    """For `spark`: the cluster, such as `spark://HOST:7077`, `yarn`, `k8s://…`, or `local[8]` for 8 cores of this
    machine. Left out: the one that `spark.master` of `conf` or of Spark's own files names, else `local[*]`."""
    conf: dict[str, str] = {}
    """For `spark`: Spark's own properties, such as `{spark.executor.memory: 8g}`; they win over ours."""

    @field_validator("conf", mode="before")
    @classmethod
    def _texts(cls, conf: Any) -> Any:
        if not isinstance(conf, dict):
            return conf
        # YAML reads 4 and true as no texts; Spark writes them as YAML does.
        return {name: json.dumps(one) if isinstance(one, bool | int | float) else one for name, one in conf.items()}

    @model_validator(mode="after")
    def _of_spark(self) -> EngineConfig:
        if self.name != "spark":
            for field, value in (("master", self.master), ("conf", self.conf)):
                if value:
                    raise ValueError(f"{field}: is for name: spark; set the name, or leave {field} out")
        return self
