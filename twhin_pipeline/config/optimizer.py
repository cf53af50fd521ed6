"""Optimizers and learning-rate schedules, as the published system names them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from twhin_pipeline.config.base import Section

Algorithm = Literal["sgd", "adam", "adagrad", "rowwise_adagrad", "rmsprop"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

PositiveRate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PiecewiseConstant(Section):
    """`learning_rate_values[i]` holds until step `learning_rate_boundaries[i]`; the last value holds for ever."""

    learning_rate_boundaries: list[int] = Field(min_length=1)
    """Steps at which the rate changes, ascending and positive."""
    learning_rate_values: list[PositiveRate] = Field(min_length=2)
    """Rates, one more than there are boundaries."""

    @model_validator(mode="after")
    def _fits(self) -> PiecewiseConstant:
        bounds = self.learning_rate_boundaries
        if bounds[0] <= 0 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"learning_rate_boundaries must be positive and ascend, got {bounds}; sort them")
        if len(self.learning_rate_values) != len(bounds) + 1:
            raise ValueError(
                f"{len(bounds)} learning_rate_boundaries need {len(bounds) + 1} learning_rate_values, "
                f"got {len(self.learning_rate_values)}; give one more value than boundaries"
            )
        return self


class LinearRampToConstant(Section):
    """From 0 to `learning_rate` over `num_ramp_steps` steps, then constant."""

    learning_rate: PositiveRate
    """The rate after the ramp."""
    num_ramp_steps: int = Field(ge=1)
    """Steps of the ramp."""


class LinearRampToCosine(Section):
    """From 0 to `learning_rate` over `num_ramp_steps`, by a cosine to `final_learning_rate` at `final_num_steps`."""

    learning_rate: PositiveRate
    """The rate at the top of the ramp."""
    final_learning_rate: PositiveRate
    """The rate from `final_num_steps` on."""
    num_ramp_steps: int = Field(ge=1)
    """Steps of the ramp."""
    final_num_steps: int = Field(ge=1)
    """The step (counted from the start of training) at which the cosine ends; above `num_ramp_steps`."""

    @model_validator(mode="after")
    def _fits(self) -> LinearRampToCosine:
        if self.final_num_steps <= self.num_ramp_steps:
            raise ValueError(
                f"final_num_steps ({self.final_num_steps}) must be above num_ramp_steps ({self.num_ramp_steps}); "
                "it counts from the start of training"
            )
        return self


class LinearDecay(Section):
    """Linearly from `learning_rate` to `final_learning_rate` over the whole training, however many steps it has.

    The steps are those of `training.num_epochs`, or `training.num_train_steps` where these are fewer, so the schedule
    carries over to a graph of another size. Training that stops early has not come down all the way.
    """

    learning_rate: PositiveRate
    """The rate of the first step."""
    final_learning_rate: PositiveRate = 0.0
    """The rate after the last step."""


def _exactly_one(section: Section, names: tuple[str, ...], what: str) -> None:
    present = [name for name in names if getattr(section, name) is not None]
    if len(present) != 1:
        raise ValueError(
            f"{what} takes exactly one of {', '.join(names)}; got {', '.join(present) or 'none'}: keep one of them"
        )


class LearningRate(Section):
    """A schedule: exactly one of its fields."""

    constant: PositiveRate | None = None
    """The same rate at every step."""
    piecewise_constant: PiecewiseConstant | None = None
    """Constant between given steps."""
    linear_ramp_to_constant: LinearRampToConstant | None = None
    """A linear warm-up, then constant."""
    linear_ramp_to_cosine: LinearRampToCosine | None = None
    """A linear warm-up, then a cosine decay."""
    linear_decay: LinearDecay | None = None
    """A linear decay over the whole training."""

    @model_validator(mode="after")
    def _one(self) -> LearningRate:
        names = ("constant", "piecewise_constant", "linear_ramp_to_constant", "linear_ramp_to_cosine", "linear_decay")
        _exactly_one(self, names, "learning_rate")
        return self


class Sgd(Section):
    """Stochastic gradient descent."""

    lr: PositiveRate
    """The learning rate where no `learning_rate` schedule is given."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum; the fused embedding optimizer has none, so on a table it must be 0."""


class Adam(Section):
    """Adam (Kingma and Ba, 2015)."""

    lr: PositiveRate
    """The learning rate where no `learning_rate` schedule is given."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments, each in [0, 1)."""
    eps: float = Field(1e-7, gt=0)
    """Added to the denominator."""

    @model_validator(mode="after")
    def _betas(self) -> Adam:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}; the usual ones are 0.9 and 0.999")
        return self


class Adagrad(Section):
    """Adagrad (Duchi et al., 2011): one accumulator an element."""

    lr: PositiveRate
    """The learning rate where no `learning_rate` schedule is given."""
    eps: float = Field(0.0, ge=0)
    """Added to the denominator; fbgemm's kernel needs a little above 0 where gradients can be 0."""


class RowwiseAdagrad(Section):
    """Row-wise Adagrad (mean squared gradient of a row; as in PyTorch-BigGraph and DLRM): 4 bytes of state a row."""

    lr: PositiveRate
    """The learning rate where no `learning_rate` schedule is given."""
    eps: float = Field(1e-8, ge=0)
    """Added to the denominator."""


class Rmsprop(Section):
    """RMSprop (Tieleman and Hinton, 2012), its accumulator without bias as Adam's: Adam with a first beta of 0.

    A row's mean of squared gradients falls also in steps in which the row has none, as if the whole table were updated:
    rare entities take larger steps than frequent ones, and late steps are no smaller than early ones. It suits
    retrieval graphs; it trains in one process, since fbgemm has no kernel for it. 4 bytes of state an element.
    """

    lr: PositiveRate
    """The learning rate where no `learning_rate` schedule is given."""
    decay: float = Field(0.999, ge=0, lt=1)
    """By which the mean of squared gradients falls in a step."""
    eps: float = Field(1e-7, gt=0)
    """Added to the denominator."""


class OptimizerConfig(Section):
    """Exactly one algorithm, and optionally a schedule that rules over its `lr`."""

    sgd: Sgd | None = None
    """Stochastic gradient descent."""
    adam: Adam | None = None
    """Adam."""
    adagrad: Adagrad | None = None
    """Adagrad."""
    rowwise_adagrad: RowwiseAdagrad | None = None
    """Row-wise Adagrad; for tables only."""
    rmsprop: Rmsprop | None = None
    """RMSprop; for tables only."""
    learning_rate: LearningRate | None = None
    """A schedule. Where it is given it rules; else the algorithm's `lr` is constant."""

    @model_validator(mode="after")
    def _one(self) -> OptimizerConfig:
        _exactly_one(self, ALGORITHMS, "an optimizer")
        return self

    @property
    def name(self) -> Algorithm:
        """Which algorithm was chosen."""
        for name in ALGORITHMS:
            if getattr(self, name) is not None:
                return name
        raise AssertionError("validated above")

    @property
    def algorithm(self) -> Sgd | Adam | Adagrad | RowwiseAdagrad | Rmsprop:
        """The chosen algorithm's own section."""
        return getattr(self, self.name)

    @property
    def unsharded(self) -> bool:
        """Whether no kernel of fbgemm's has it, so that one process must hold the whole table."""
        return self.rmsprop is not None

    @property
    def schedule(self) -> LearningRate:
        """The schedule in force."""
        return self.learning_rate or LearningRate(constant=self.algorithm.lr)
