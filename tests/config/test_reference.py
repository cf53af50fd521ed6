"""The configuration reference is current, and no field of the configuration is idle."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from twhin_pipeline.config import TwhinConfig, reference
from twhin_pipeline.config.optimizer import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("base", "data", "model", "optimizer", "training", "tune")
FIELDS = sorted(
    {
        (section.__name__, name)
        for section in [TwhinConfig, *(section for _, section, _ in reference.sections())]
        for name in section.model_fields
    }
)


# The algorithm's own section and its rate are reached through properties of OptimizerConfig.
READ_AS = dict.fromkeys(ALGORITHMS, "algorithm") | {"lr": "schedule"}
# Only 1 is taken: the section itself refuses more, so there is nothing to read.
REFUSED = {"gradient_accumulation"}


@cache
def reads() -> Counter[str]:
    """Count the places outside the sections themselves that read an attribute, by its name."""
    found: Counter[str] = Counter()
    sections = {ROOT / "twhin_pipeline" / "config" / f"{name}.py" for name in SECTIONS}
    files = {*ROOT.glob("twhin_pipeline/**/*.py"), *ROOT.glob("assets/*.py"), *ROOT.glob("resources/*.py")}
    assert sections < files
    for path in files - sections:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found[node.attr] += 1
    return found


def test_the_reference_is_current():
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert page == reference.markdown(), "docs/reference/configuration.md is not current; run `make reference`"


@pytest.mark.parametrize("field", sorted({name for _, name in FIELDS} - REFUSED))
def test_every_field_is_read_by_something(field):
    """A field that nothing reads is a promise that nothing keeps. Where sections share a name, each needs a reader."""
    if field in READ_AS:
        assert reads()[READ_AS[field]]
    else:
        assert reads()[field] >= sum(name == field for _, name in FIELDS)


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=[f"{s}.{f}" for s, f in FIELDS])
def test_every_field_is_described(section, field):
    sections = {s.__name__: s for _, s, _ in reference.sections()} | {"TwhinConfig": TwhinConfig}
    description = sections[section].model_fields[field].description
    assert description
    assert " ".join(description.split()) in reference.markdown() or section == "TwhinConfig"


def test_bounds_and_defaults_are_shown():
    page = reference.markdown()
    assert "| `alpha` | number, ≥ 0, ≤ 2 | `0.75` |" in page
    assert "| `data_type` | `fp32` or `fp16` | `fp32` |" in page
    assert "| `tables` | list of sections, at least 1 | required |" in page
