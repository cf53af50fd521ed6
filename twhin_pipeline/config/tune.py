"""What a search over hyperparameters tries."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from twhin_pipeline.config.base import Section
from twhin_pipeline.errors import unknown


class Searched(Section):
    """The values a searched field may take: a range, or a list."""

    low: int | float | None = None
    """The least value."""
    high: int | float | None = None
    """The greatest value."""
    log: bool = False
    """Whether values are drawn on a logarithmic scale."""
    choices: list[Any] | None = None
    """The values themselves, each as it would be in the file."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        # Said here: the path of the searched field is a key too, which hides the section from the general message.
        for key in value if isinstance(value, dict) else ():
            if key not in cls.model_fields:
                raise ValueError(unknown("key", key, cls.model_fields))
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Searched:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None or self.log:
                raise ValueError("must be {low: , high: } or {choices: [one or more]}, not both; keep one of them")
            return self
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"needs low below high, or choices; got low {self.low}, high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, got {self.low}; raise it or set log: false")
        return self

    @property
    def is_integer(self) -> bool:
        """Whether the range is of integers: both of its ends are."""
        return isinstance(self.low, int) and isinstance(self.high, int)


class TuneConfig(Section):
    """A search over hyperparameters, for `twhin tune` and `twhin run --tune`."""

    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    """`twhin run` searches for so long before it trains, and then trains with the best values; `--tune MINUTES` sets
    this. Trials train for fewer epochs, and on a part of the edges where there are very many. The command line alone
    does so: in Dagster there is the job `tune`. Left out: no search."""
    search: dict[str, Searched] = {}
    """The fields to search, by their path as for `--set`, in `model`, `training`, `train_data`, `negatives`, `loss` and
    `runtime`. Each takes `{low: 0.01, high: 1.0, log: true}` (whole numbers, if both ends are) or `{choices: [..]}`.
    Left out: those values of the recipe that depend most on the graph and that the configuration does not set."""
    trials: int = Field(20, ge=1, le=1_000_000)
    """Trials of the search, those of earlier calls included."""
    timeout_s: float | None = Field(None, gt=0)
    """No further trial begins after so many seconds; left out, all are made."""
    prune: bool = True
    """End a trial whose validation metric is, from its third evaluation on, below the median of those before it."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the values that are tried."""
    outcome: dict[str, Any] | None = None
    """What `twhin run --tune` found, for training to store with the model (`tuned`); the run sets it."""
