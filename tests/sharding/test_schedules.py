"""Schedules against literal values, and groups that move together."""

import pytest

from twhin_pipeline.config.optimizer import LearningRate
from twhin_pipeline.sharding.schedules import GroupSchedule, rate_at

PIECEWISE = {"learning_rate_boundaries": [3, 5], "learning_rate_values": [0.3, 0.2, 0.1]}
RAMP = {"learning_rate": 0.4, "num_ramp_steps": 4}
COSINE = {"learning_rate": 1.0, "final_learning_rate": 0.2, "num_ramp_steps": 2, "final_num_steps": 6}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"constant": 0.05}, [0.05] * 9),
        ({"piecewise_constant": PIECEWISE}, [0.3, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]),
        ({"linear_ramp_to_constant": RAMP}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]),
        # 0.2 + 0.8 * (1 + cos(pi * t / 4)) / 2 for t = 0..4
        ({"linear_ramp_to_cosine": COSINE}, [0.0, 0.5, 1.0, 0.8828427, 0.6, 0.3171573, 0.2, 0.2, 0.2]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_rates_by_step(schedule, expected):
    config = LearningRate.model_validate(schedule)
    assert [rate_at(config, step) for step in range(9)] == pytest.approx(expected, abs=1e-7)


def test_a_linear_decay_covers_the_training_whatever_its_length():
    config = LearningRate.model_validate({"linear_decay": {"learning_rate": 0.5, "final_learning_rate": 0.1}})
    assert [rate_at(config, step, 4) for step in range(6)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert [rate_at(config, step, 2) for step in range(4)] == pytest.approx([0.5, 0.3, 0.1, 0.1])
    to_nothing = LearningRate.model_validate({"linear_decay": {"learning_rate": 0.5}})
    assert [rate_at(to_nothing, step, 2) for step in range(3)] == pytest.approx([0.5, 0.25, 0.0])


def test_a_linear_decay_that_is_not_told_the_steps_is_an_error():
    config = LearningRate.model_validate({"linear_decay": {"learning_rate": 0.5}})
    with pytest.raises(ValueError, match="linear_decay needs total_steps"):
        GroupSchedule({"user": config}, lambda rates: None)


def test_a_training_that_goes_on_with_another_number_of_steps_still_ends_at_the_final_rate():
    """At another world size an epoch has other steps."""
    config = LearningRate.model_validate({"linear_decay": {"learning_rate": 0.4, "final_learning_rate": 0.2}})
    schedule = GroupSchedule({"user": config}, lambda rates: None, total_steps=100)
    schedule.load_state_dict({"step": 5}, total_steps=10)
    assert schedule.rates() == {"user": pytest.approx(0.3)}
    for _ in range(5):
        schedule.step()
    assert schedule.rates() == {"user": pytest.approx(0.2)}


def groups() -> dict[str, LearningRate]:
    return {
        "user": LearningRate.model_validate({"piecewise_constant": PIECEWISE}),
        "item": LearningRate.model_validate({"linear_ramp_to_constant": RAMP}),
    }


def test_each_group_follows_its_own_schedule_and_is_applied_from_the_start():
    applied = []
    schedule = GroupSchedule(groups(), applied.append)
    for _ in range(3):
        schedule.step()
    assert [rates["user"] for rates in applied] == [0.3, 0.3, 0.3, 0.2]
    assert [rates["item"] for rates in applied] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert schedule.rates() == applied[-1]


def test_a_loaded_schedule_goes_on_where_it_was_saved():
    first = GroupSchedule(groups(), lambda rates: None)
    for _ in range(4):
        first.step()
    applied = []
    second = GroupSchedule(groups(), applied.append)
    second.load_state_dict(first.state_dict())
    assert second.rates() == first.rates() == applied[-1]
    first.step()
    second.step()
    assert second.rates() == first.rates()
