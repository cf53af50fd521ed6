"""A configuration beyond reason is one clear line, at once: no traceback, no hang, nothing begun."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from twhin_pipeline.config import TwhinConfig, load_config, parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import scan, source

BASE = """
source: {path: e.csv, columns: {time: t}}
model:
  embeddings: {tables: [{name: user}, {name: item}]}
  relations: [{name: likes, lhs: user, rhs: item}]
"""


def bomb(indent: str) -> str:
    """Return a list of 9^10 values, written as lists of aliases."""
    lines = [f"{indent}q0: &q0 [l, l, l, l, l, l, l, l, l]"]
    lines += [f"{indent}q{n}: &q{n} [{', '.join([f'*q{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines) + "\n"


MERGES = "".join(f"    q{n}: &q{n} {{<<: [{', '.join([f'*q{n - 1}'] * 6)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (bomb("") + BASE, r"line \d+: has more than 100,000 values, aliases written out"),
        (BASE + "launch:\n  env:\n" + bomb("    "), r"line \d+: has more than 100,000 values, aliases written out"),
        (BASE + "evaluation:\n  floors:\n    q0: &q0 {auc: 1}\n" + MERGES, "has more than 100,000 values"),
        (BASE + "launch: {{a: b}: c}\n", "line 6: a key is a list or a mapping; make it a name"),
        (BASE + "launch:\n  ? [a, b]\n  : c\n", "line 7: a key is a list or a mapping"),
        (BASE + "launch: " + "{a: " * 1000 + "1" + "}" * 1000, "is nested deeper than 50 levels"),
        (BASE + "launch: " + "[" * 60 + "]" * 60, "line 6: is nested deeper than 50 levels"),
        (BASE + "launch: &a {env: *a}\n", "line 6: a value contains itself by an alias"),
        (BASE + "# " + "x" * (1 << 20), "is larger than 1,048,576 bytes"),
        (BASE + f"training: {{seed: {'9' * 5000}}}", "Exceeds the limit"),
    ],
)  # fmt: skip
def test_yaml_beyond_reason_is_one_clear_error_at_once(tmp_path, text, told):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(UserError, match=told) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value).splitlines()) == 1
    assert time.process_time() - started < 10


@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize(("name", "told"), [("pipe", "is a named pipe"), ("/dev/zero", "is a device")])
def test_a_configuration_that_is_no_file_is_not_waited_for(tmp_path, prefix, name, told):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"{told}; copy what it gives to a file"):
        load_config(f"{prefix}{tmp_path / name}")


def data(**sections: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(BASE)
    for path, value in sections.items():
        *parents, last = path.split("__")
        node = found
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return found


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("training__seed", -1, "greater than or equal to 0"),
        ("training__seed", 10**23, r"training\.seed: 10{23} is beyond 64 bits"),
        ("split__seed", -1, "greater than or equal to 0"),
        ("negatives__seed", -1, "greater than or equal to 0"),
        ("evaluation__seed", -1, "greater than or equal to 0"),
        ("evaluation__seed", 2**62, "less than"),
        ("training__eval_timeout_in_s", float("inf"), "finite number"),
        ("model__translation_optimizer", {"adam": {"lr": 0.1, "eps": float("inf")}}, "finite number"),
        ("model__translation_optimizer", {"adagrad": {"lr": 0.1, "eps": float("nan")}}, "finite number"),
        ("launch__hbm_gib", float("inf"), "finite number"),
        ("evaluation__floors", {"auc": float("nan")}, "finite number"),
        ("tune__timeout_s", float("inf"), "finite number"),
        ("train_data__global_negatives", 10**9, "from 0 to 1,000,000"),
        ("train_data__in_batch_negatives", 10**9, "less than or equal to 65536"),
        ("train_data__per_replica_batch_size", 10**12, "less than or equal to 10000000"),
        ("launch__nproc_per_node", 10**6, "less than or equal to 1024"),
        ("launch__data_threads", 10**6, "less than or equal to 1024"),
        ("source__window", "10000000d", "longer than 3,652,058 days"),
        ("source__half_life", "99999999999999999999w", "longer than 3,652,058 days"),
        ("training__num_train_steps", 10**30, "beyond 64 bits"),
    ],
)
def test_numbers_beyond_reason_are_refused_with_their_path(field, value, told):
    with pytest.raises(UserError, match=told) as caught:
        parse_config(data(**{field: value}))
    assert field.replace("__", ".") in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("embedding_dim", 4 * 10**9), ("num_embeddings", 10**13)],
)
def test_tables_beyond_any_memory_are_refused(field, value):
    changed = data()
    changed["model"]["embeddings"]["tables"][0][field] = value
    with pytest.raises(UserError, match=rf"tables\[0\]\.{field}: Input should be less than or equal"):
        parse_config(changed)


def test_no_number_of_the_configuration_may_be_infinite():
    def sections(model: Any) -> list[Any]:
        found = [model]
        for field in model.model_fields.values():
            for kind in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if isinstance(kind, type) and hasattr(kind, "model_fields"):
                    found += sections(kind)
        return found

    assert len(sections(TwhinConfig)) > 15
    assert all(section.model_config["allow_inf_nan"] is False for section in sections(TwhinConfig))


@pytest.mark.parametrize("snapshot", ["0001-01-01", "0002-06-01", "9999-12-30"])
def test_a_window_from_before_the_calendar_begins_has_no_bound(snapshot):
    config = parse_config(data(source__window="3652058d"))
    (spec,) = [source.Input("source", "source.path", config.source, snapshot, [], "csv")]
    start, end = scan.window(spec)
    assert (start is None) is (snapshot != "9999-12-30") and end.year in (1, 2, 9999)


def test_the_last_day_of_the_calendar_is_no_snapshot():
    with pytest.raises(UserError, match="has no day after it; choose an earlier one"):
        source.check_snapshot("9999-12-31")


def test_negatives_of_a_long_training_are_made_for_twenty_epochs_and_used_again():
    """A million epochs once were a million pools of negatives, and `twhin sample` did not end."""
    assert parse_config(data(training__num_epochs=10**6)).epochs_of_negatives == 20
    assert parse_config(data(training__num_epochs=3)).epochs_of_negatives == 3
    assert parse_config(data(training__num_epochs=10**6, negatives__epochs=40)).epochs_of_negatives == 40


def test_the_message_shows_the_beginning_of_a_long_value(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(BASE + f"launch: [{', '.join(['long'] * 5000)}]")
    with pytest.raises(UserError, match=r"launch: .*got \['long'") as caught:
        load_config(str(path))
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_bundled_file_is_within_every_limit():
    for path in sorted(Path(__file__).resolve().parents[2].glob("configs/*.yaml")):
        load_config(str(path))
