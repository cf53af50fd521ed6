"""One Spark session for all tests of this folder: it takes seconds to start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from edge_files import make_config
from two_engines import ON_SPARK

from twhin_pipeline.spark import session


@pytest.fixture(scope="session")
def java() -> None:
    """Skip where Spark cannot run."""
    if shutil.which("java") is None and not os.environ.get("JAVA_HOME"):
        pytest.skip("the Spark engine needs Java 17: `make java`, or set JAVA_HOME")


@pytest.fixture(scope="session")
def spark(java: None) -> Iterator[object]:
    """Start Spark on two cores of this machine; stages find the session and leave it running."""
    with session.session(make_config("unused.parquet", engine=ON_SPARK)) as started:
        yield started
