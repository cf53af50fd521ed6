"""The pipeline's configuration as a Dagster resource, so that one run reads one configuration in every step and check.

What belongs here: which YAML file, and fields set for one run from the launchpad. What does not: the fields themselves
(`twhin_pipeline/config`).
https://docs.dagster.io/guides/operate/configuration/run-configuration
"""

from __future__ import annotations

import os

import dagster as dg
from pydantic import Field

from twhin_pipeline.config import TwhinConfig, default_config_path, load_config
from twhin_pipeline.config.configuration_file import named

CONFIG_ENV = "TWHIN_CONFIG"


def config_path() -> str:
    """Return the YAML file that TWHIN_CONFIG names, else the bundled example's."""
    return named(os.environ.get(CONFIG_ENV) or default_config_path())


class ConfigurationResource(dg.ConfigurableResource):
    """A TwhinConfig: a file, and fields set over it."""

    path: str = Field(
        default="",
        description=f"Path or URL of the YAML file. Empty: the environment variable {CONFIG_ENV}, else Debian's.",
    )
    set: list[str] = Field(
        default=[],
        description="Fields to set for this run, each `path.to.field=value`, such as `training.num_epochs=3`.",
    )

    @property
    def file(self) -> str:
        """The YAML file in force."""
        return named(self.path) if self.path else config_path()

    def load(self) -> TwhinConfig:
        """Return the configuration. Raises UserError that names each wrong field."""
        return load_config(self.file, self.overrides())

    def overrides(self) -> list[str]:
        """Return the fields that are set over the file, for a process that reads the file itself."""
        return list(self.set)
