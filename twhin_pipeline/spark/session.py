"""A Spark session as `engine` asks for it, and its errors as ours."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from twhin_pipeline import extras
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from twhin_pipeline.config import TwhinConfig

ROWS_AT_ONCE = 1 << 16
"""Rows of an Arrow batch that Spark and Python exchange."""
ROWS_PER_TASK = 500_000
"""About how many rows a task of a shuffle takes."""
LEAST_ROWS = 20_000
"""Fewer rows are not worth a task of their own."""
_DRIVER = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""A driver beside a cluster plans and sees no rows: compiling its loops for speed takes longer than they run."""
_LOOPBACK = re.compile(r"local|spark://(127\.|localhost[:/]|\[::1\])")
_OURS = re.compile(r"twhin_pipeline\.errors\.(?:UserError|UnavailableError): (.*?)\s*$", re.DOTALL)


@contextmanager
def session(config: TwhinConfig) -> Iterator[SparkSession]:
    """Yield a session; one that this call has started is stopped afterwards, so that a cluster gets its cores back.

    Raises:
        UserError: pyspark or Java is missing, or a task has raised one.
    """
    extras.need("pyspark", "engine.name: spark")
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    spark = active or _start(config)
    values = {
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_AT_ONCE),
        # Spark takes what tasks read in Python for small, and would send full vocabularies to the driver, and then to
        # each worker. So it does that only with what it has seen to be small.
        "spark.sql.autoBroadcastJoinThreshold": "-1",
        "spark.sql.adaptive.autoBroadcastJoinThreshold": "10MB",
    }
    for name, value in values.items():
        if name not in config.engine.conf:
            spark.conf.set(name, value)
    try:
        yield spark
    except PySparkException as error:
        if (ours := _OURS.search(_without_java(str(error)))) is not None:
            raise UserError(ours[1]) from error
        raise
    finally:
        if active is None:
            spark.stop()


def _without_java(text: str) -> str:
    """Return the Python part of an error's text."""
    return re.split(r"\n+\s*(?:JVM stacktrace:|at (?:org|java|scala)\.|SQLSTATE: )", text)[0]


def _no_java() -> UserError:
    return UserError(
        "engine.name: spark needs Java 17, and none was found; install it (apt-get install openjdk-17-jre-headless), "
        "or set JAVA_HOME"
    )


def _start(config: TwhinConfig) -> SparkSession:
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    if shutil.which("java") is None and not os.environ.get("JAVA_HOME"):
        raise _no_java()
    # Else workers take the system's Python, which lacks our packages.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    chosen = config.engine
    master = chosen.master or chosen.conf.get("spark.master") or os.environ.get("SPARK_MASTER") or "local[*]"
    builder: Any = SparkSession.builder.master(master).appName("twhin-pipeline")
    values = {
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        # One thread for each task: Spark itself runs as many tasks as there are cores.
        "spark.executorEnv.OMP_NUM_THREADS": "1",
        "spark.executorEnv.NUMBA_NUM_THREADS": "1",
        "spark.sql.adaptive.enabled": "true",
        "spark.speculation": "false",
    }
    if _LOOPBACK.match(master):  # nobody else needs to reach this machine
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        values |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
        }
    if not master.startswith("local"):
        values["spark.driver.extraJavaOptions"] = _DRIVER
    for name, value in {**values, **chosen.conf}.items():
        builder = builder.config(name, value)
    try:
        spark: SparkSession = builder.getOrCreate()
    except PySparkException as error:
        if "JAVA_GATEWAY" in str(error):
            raise _no_java() from error
        raise
    except Py4JJavaError as error:
        raise UserError(
            f"engine.master: Spark starts no session at {master}; see that it runs and can be reached, and that "
            "engine.conf is right (Spark's own messages are above)"
        ) from error
    # It says, each quarter of a minute, that no worker has the memory and the cores that are asked for.
    log4j: Any = spark.sparkContext._jvm.org.apache.logging.log4j  # type: ignore[union-attr]
    log4j.core.config.Configurator.setLevel("org.apache.spark.scheduler.TaskSchedulerImpl", log4j.Level.WARN)
    return spark


def tasks(spark: SparkSession, rows: int, per_task: int = ROWS_PER_TASK) -> int:
    """Return into how many tasks so many rows are divided: two for each core, so that none waits long, or more."""
    each_core = min(2 * spark.sparkContext.defaultParallelism, -(-rows // LEAST_ROWS))
    return max(each_core, -(-rows // per_task), 1)


def expect(spark: SparkSession, rows: int) -> None:
    """Divide joins and groups of so many rows; Spark joins small tasks again."""
    spark.conf.set("spark.sql.shuffle.partitions", str(tasks(spark, rows)))
