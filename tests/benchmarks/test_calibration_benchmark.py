"""The benchmark of calibration says what is missing, and prints what evaluation measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa

from twhin_pipeline.config.training import LossConfig
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.store import Store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import calibration


def test_it_is_of_every_loss_there_is() -> None:
    assert set(calibration.LOSSES) == set(LOSSES) and all(LossConfig(name=one) for one in calibration.LOSSES)


def test_a_missing_graph_is_named(tmp_path, capsys) -> None:
    assert calibration.main(["gowalla", "--data", str(tmp_path)]) == 2
    assert f"{tmp_path}: has no gowalla/edges.parquet; pass the folder" in capsys.readouterr().err


def test_the_printed_figures_are_those_of_the_evaluation(tmp_path) -> None:
    store, snapshot = Store(str(tmp_path)), calibration.GRAPHS["gowalla"].snapshot
    rows = [
        {"relation": name, "side": "rhs", "metric": "ece", "value": value, "edges": edges}
        for name, value, edges in (("all", 0.01, 900), ("many", 0.02, 300), ("few", 0.5, 30))
    ]
    with store.replace("evaluation", snapshot, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist(rows))
        figures = {"auc": 0.9, "rce": -120.0, "calibrated_rce": 50.0, "ece": 0.01}
        draft.details = {"edges": 900, "metrics": figures}
    found = calibration.result_of(store, "gowalla", "bce")
    assert found.worst_ece == 0.02 and found.reached
    line = "| gowalla | `bce` | 900 | 0.900 | -120.0 | 50.0 | 0.0100 | 0.0200 |"
    assert calibration.table([found]).splitlines()[-1] == line
