"""The configuration accepts what was published, and answers a mistake with one line that says where and what to do."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from twhin_pipeline.config import TwhinConfig, apply_override, load_config, parse_config
from twhin_pipeline.config.data import SnapshotDays
from twhin_pipeline.config.optimizer import LearningRate, OptimizerConfig
from twhin_pipeline.config.twhin_config import RENAMED
from twhin_pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

SMALL: dict[str, Any] = {
    "source": {"path": "edges-{snapshot}.parquet"},
    "model": {
        "embeddings": {"tables": [{"name": "user"}, {"name": "item"}]},
        "relations": [{"name": "likes", "lhs": "user", "rhs": "item"}],
    },
}


def small(**changes: Any) -> dict[str, Any]:
    """Return a small valid configuration with overrides `a__b=value` for `a.b=value`."""
    data = copy.deepcopy(SMALL)
    for path, value in changes.items():
        apply_override(data, f"{path.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True).strip()}")
    return data


def test_published_local_yaml_loads_unchanged_with_its_published_values():
    config = load_config(str(ROOT / "configs" / "twitter.yaml"))
    sizes = {table.name: table.num_embeddings for table in config.model.embeddings.tables}
    assert sizes == {"user": 424_241, "tweet": 72_543}
    assert config.model.embedding_dim == 4
    assert config.model.relation_names == ["fav", "reply", "retweet", "magic_recs"]
    assert config.training.num_train_steps == 100_000
    assert config.train_data.in_batch_negatives == 10 and config.train_data.limit == 9_990
    assert config.validation_data.offset == 9_990 and config.validation_data.limit == 10
    assert config.model.table("tweet").optimizer.schedule == LearningRate(constant=0.005)
    assert config.model.translation_optimizer.schedule == LearningRate(constant=0.05)


def test_every_bundled_configuration_loads():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert isinstance(load_config(str(path)), TwhinConfig)


def test_published_defaults_are_kept():
    config = parse_config(small())
    training = config.training
    assert (training.num_train_steps, training.num_epochs, training.checkpoint_every_n) == (10_000, 1, 1_000)
    assert (training.train_log_every_n, training.num_eval_steps, training.eval_log_every_n) == (1_000, 16_384, 5_000)
    assert training.eval_timeout_in_s == 3_600
    adam = OptimizerConfig(adam={"lr": 0.1}).adam
    assert adam is not None and adam.betas == (0.9, 0.999) and adam.eps == 1e-7


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"trainin__num_epochs": 3}, "trainin", "did you mean 'training'"),
        ({"train_data__per_replica_batch": 3}, "train_data.per_replica_batch", "'per_replica_batch_size'"),
        ({"training__num_epochs": "many"}, "training.num_epochs", "integer"),
        ({"model__relations__likes__lhs": "usr"}, "model.relations[0].lhs", "did you mean 'user'"),
        ({"model__relations__likes__operator": "translate"}, "model.relations[0].operator", "translation"),
        ({"model__embeddings__tables__item__name": "user"}, "model.embeddings", "two tables are named 'user'"),
        (
            {
                "model__embeddings__tables__user__embedding_dim": 128,
                "model__embeddings__tables__item__embedding_dim": 64,
            },
            "model.embeddings",
            "user 128, item 64",
        ),
        ({"model__embeddings__tables__item__data_type": "fp16"}, "model.embeddings", "data_type must be equal"),
        ({"model__embeddings__tables_to_log": ["usr"]}, "model.embeddings", "did you mean 'user'"),
        ({"model__comparator": "cosin"}, "model.comparator", "did you mean 'cosine'"),
        ({"loss__name": "softmx"}, "loss.name", "did you mean 'softmax'"),
        ({"training__gradient_accumulation": 4}, "training", "raise train_data.per_replica_batch_size"),
        ({"split__validation": 0.6, "split__test": 0.5}, "split", "leave nothing to train on"),
        ({"split__strategy": "given"}, "", "source.columns.split"),
        ({"split__strategy": "temporal"}, "", "source.columns.time or split.later_snapshot"),
        ({"split__relations": ["like"]}, "split.relations", "did you mean 'likes'"),
        ({"source__window": "90 days"}, "source.window", "90d"),
        ({"source__window": "90d"}, "source", "columns.time"),
        ({"source__snapshots": ["2025"]}, "source.snapshots", "YYYY-MM-DD"),
        ({"source__snapshots": "2025-01-01"}, "source.snapshots", "a list of dates, or days such as {from: 2025-01-01"),
        (
            {"source__path": "log.csv", "source__snapshots": {"from": "2025-01-01"}},
            "source.snapshots",
            "days of a log need columns.time",
        ),
        ({"source__snapshots": {"every": "1d"}}, "source.snapshots.from", "is missing"),
        ({"source__snapshots": {"from": "2025-01-01", "evry": "1d"}}, "source.snapshots.evry", "did you mean 'every'"),
        ({"source__snapshots": {"from": "2025-13-01"}}, "source.snapshots.from", "month must be in 1..12"),
        ({"source__snapshots": {"from": "2025-01-01", "every": "12h"}}, "source.snapshots.every", "days or weeks"),
        ({"source__snapshots": {"from": "2025-01-01", "every": "daily"}}, "source.snapshots.every", "such as 90d"),
        (
            {"source__snapshots": {"from": "2025-01-02", "to": "2025-01-01"}},
            "source.snapshots.to",
            "is before from: 2025-01-02",
        ),
        ({"split__strategy": "temporal", "split__later_snapshot": "later"}, "split.later_snapshot", "YYYY-MM-DD"),
        ({"train_data__global_negatives": 0, "train_data__in_batch_negatives": 0}, "", "nothing would be contrasted"),
        (
            {"train_data__global_negatives": "all"},
            "train_data.in_batch_negatives",
            "64 candidates would be counted twice",
        ),
        ({"train_data__global_negatives": "every"}, "train_data.global_negatives", "from 0 to 1,000,000, or all"),
        ({"train_data__global_negatives": -1}, "train_data.global_negatives", "from 0 to 1,000,000, or all"),
        ({"train_data__sampled_per_step": 100}, "train_data", "is a sample of global_negatives: all"),
        ({"validation_data__global_negatives": "all"}, "validation_data", "selection_metric: filtered_mrr"),
        ({"launch__nnodes": 2}, "launch", "rdzv_endpoint"),
        ({"launch__slurm": {"partition": "gpu"}}, "launch", "launch.slurm is set and kind is local; set kind: slurm"),
        (
            {"launch__kind": "slurm", "launch__kubernetes": {"image": "i"}},
            "launch",
            "launch.kubernetes is set and kind is slurm",
        ),
        ({"launch__kind": "kubernetes"}, "launch", "needs the section launch.kubernetes with image"),
        (
            {"launch__kind": "slurm", "launch__rdzv_endpoint": "a:1"},
            "launch",
            "sets node_rank and rdzv_endpoint itself",
        ),
        ({"launch__kind": "slurm", "launch__slurm": {"time": "1 h"}}, "launch.slurm.time", "has a space"),
        ({"launch__kind": "slurm", "launch__slurm": {"sbatch": ["gpu"]}}, "launch.slurm.sbatch", "no option of sbatch"),
        ({"launch__kind": "slurm", "launch__slurm": {"setup": ["a\nb"]}}, "launch.slurm.setup", "line break"),
        (
            {"launch__kind": "kubernetes", "launch__kubernetes": {"image": "i", "namespace": "My Team"}},
            "launch.kubernetes.namespace",
            "no name of Kubernetes",
        ),
        (
            {"launch__kind": "kubernetes", "launch__kubernetes": {"image": "i", "volumes": {"data": "data"}}},
            "launch.kubernetes.volumes",
            "absolute path",
        ),
        ({"source": None}, "", "give source.path, or train_data.data_root"),
        (
            {
                "model__embeddings__tables__user__optimizer": {"rmsprop": {"lr": 0.1}},
                "launch__nproc_per_node": 2,
            },
            "",
            "rmsprop, of 'user', trains in one process, and launch asks for 2",
        ),
        ({"model__translation_optimizer": {"rmsprop": {"lr": 0.1}}}, "model", "rmsprop is for tables"),
        (
            {"model__embeddings__tables__user__optimizer": {"sgd": {"lr": 1}, "adam": {"lr": 1}}},
            "model.embeddings.tables[0].optimizer",
            "exactly one of",
        ),
        (
            {
                "model__embeddings__tables__user__optimizer": {
                    "sgd": {"lr": 1},
                    "learning_rate": {
                        "linear_ramp_to_cosine": {
                            "learning_rate": 1,
                            "final_learning_rate": 0,
                            "num_ramp_steps": 10,
                            "final_num_steps": 5,
                        }
                    },
                }
            },
            "model.embeddings.tables[0].optimizer.learning_rate.linear_ramp_to_cosine",
            "must be above num_ramp_steps",
        ),
        (
            {
                "model__embeddings__tables__user__optimizer": {
                    "sgd": {"lr": 1},
                    "learning_rate": {
                        "piecewise_constant": {"learning_rate_boundaries": [5, 2], "learning_rate_values": [1, 2, 3]}
                    },
                }
            },
            "model.embeddings.tables[0].optimizer.learning_rate.piecewise_constant",
            "ascend",
        ),
    ],
)
def test_each_mistake_is_one_line_that_names_the_path_and_the_remedy(changes, where, what):
    with pytest.raises(UserError) as caught:
        parse_config(small(**changes), origin="c.yaml")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith("c.yaml: " + where)
    assert what in message


def test_all_entities_as_candidates_need_no_epochs_of_negatives():
    every = {"train_data__global_negatives": "all", "train_data__in_batch_negatives": 0, "training__num_epochs": 7}
    assert parse_config(small(**every)).epochs_of_negatives == 1
    assert parse_config(small(training__num_epochs=7)).epochs_of_negatives == 7
    assert parse_config(small(training__num_epochs=7, negatives__epochs=3)).epochs_of_negatives == 3


def test_two_tables_without_a_relation_are_refused():
    data = small()
    data["model"]["embeddings"]["tables"].append({"name": "alone"})
    with pytest.raises(UserError, match="'alone' is on no side of any relation"):
        parse_config(data)


def test_overrides_reach_any_field_by_its_path():
    path = str(ROOT / "configs" / "debian.yaml")
    overrides = ["training.num_epochs=3", "model.embeddings.tables.tag.optimizer.rowwise_adagrad.lr=0.5"]
    config = load_config(path, [*overrides, "model.relations.2.weight=0.25"])
    assert config.training.num_epochs == 3
    assert config.model.table("tag").optimizer.schedule == LearningRate(constant=0.5)
    assert config.model.relations[2].weight == 0.25


def test_dates_need_no_quotes_in_files_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    text = yaml.safe_dump(small()) + "split: {strategy: temporal, later_snapshot: 2025-08-09}\n"
    path.write_text(text)
    config = load_config(str(path), ["source.columns.time=at", "source.snapshots={from: 2025-01-01, every: 7d}"])
    assert config.source is not None and isinstance(config.source.snapshots, SnapshotDays)
    (tmp_path / "printed.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "printed.yaml")) == config
    config = load_config(str(path), ["source.snapshots=[2023-06-10, 2025-08-09]"])
    assert config.split.later_snapshot == "2025-08-09"
    assert config.source is not None and config.source.snapshots == ["2023-06-10", "2025-08-09"]
    assert load_config(str(path), ["split.later_snapshot=2023-06-10"]).split.later_snapshot == "2023-06-10"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("training.num_epochs", "must look like"),
        ("training.num_epochs.x=3", "no fields|nothing below|unknown key|valid integer"),
        ("model.relations.dependz.weight=1", "did you mean 'depends'"),
        ("training.num_epochs=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_one_error(override, what):
    with pytest.raises(UserError, match=what):
        load_config(str(ROOT / "configs" / "debian.yaml"), [override])


def test_a_missing_or_broken_file_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        load_config(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "broken.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"broken\.yaml: is not YAML"):
        load_config(str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="must hold sections"):
        load_config(str(tmp_path / "list.yaml"))


def test_the_hash_follows_what_is_learned_and_not_where_it_runs():
    config = parse_config(small())
    assert parse_config(small(launch__nproc_per_node=4)).hash() == config.hash()
    assert parse_config(small(training__seed=1)).hash() != config.hash()


def test_a_resolved_configuration_reads_back_as_itself():
    config = load_config(str(ROOT / "configs" / "twitter.yaml"))
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_wandb_is_accepted_and_said_not_to_be_used():
    with pytest.warns(UserWarning, match="MLflow"):
        parse_config(small(runtime__wandb={"host": "x"}))


def test_loading_a_configuration_imports_neither_torch_nor_duckdb():
    code = (
        "import sys; from twhin_pipeline.config import load_config; load_config('configs/debian.yaml');"
        "assert not {'torch', 'duckdb', 'mlflow', 'dagster'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_key_that_is_there_twice_is_an_error_not_a_silent_choice(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {seed: 1}\nmodel: {}\ntraining: {seed: 2}\n")
    with pytest.raises(UserError, match=r"c\.yaml: is not YAML: key 'training' is there twice.*line 3"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("path", ["s9://bucket/c.yaml", "c.yaml"])
def test_a_configuration_that_is_no_text_or_of_no_known_protocol_is_one_clear_error(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot be read .*give the path or URL of a YAML file"):
        load_config(path)


def test_a_floor_of_no_metric_is_told_before_anything_is_trained():
    with pytest.raises(UserError, match=r"evaluation\.floors: unknown metric 'filtered_hits@5'.*'filtered_hits@3'"):
        parse_config(small(evaluation__floors={"filtered_hits@5": 0.1}))
    parse_config(small(evaluation__floors={"filtered_mrr": 0.1, "raw_hits@3": 0.1, "ndcg@20": 0.1, "auc": 0.5}))


@pytest.mark.parametrize("name", ["/location/country/form_of_government", "it's", "a.b c", "ünï", "5", "--"])
def test_a_relation_may_be_called_anything_and_a_table_may_not(name):
    assert parse_config(small(model__relations__0__name=name)).model.relation_names == [name]
    with pytest.raises(UserError, match=r"model\.embeddings\.tables\[0\]\.name: .*rename it"):
        parse_config(small(model__embeddings__tables__user__name=name))


@pytest.mark.parametrize("name", ["", " ", "all", "a\nb", "a\x00"])
def test_a_relation_needs_a_name_that_can_be_printed_and_is_not_taken(name):
    data = small()
    data["model"]["relations"][0]["name"] = name
    with pytest.raises(UserError, match=r"model\.relations\[0\]\.name: .*rename it"):
        parse_config(data)


STAR = {"name": "*", "lhs": "user", "rhs": "item"}


def test_one_entry_stands_for_the_relations_of_the_source():
    data = small()
    data["model"]["relations"] = [STAR]
    data["split"] = {"relations": ["known once the source is read"]}
    config = parse_config(data)
    assert config.model.every_other is not None and config.model.relation_names == ["*"]
    apply_override(data, "model.relations.*.operator=rotation")
    assert parse_config(data).model.every_other.operator == "rotation"  # type: ignore[union-attr]
    data["model"]["relations"] = [STAR, STAR]
    with pytest.raises(UserError, match=r"model: relations\[0\]|two relations are named '\*'"):
        parse_config(data)


@pytest.mark.parametrize("source", [None, {"path": "e.parquet", "ids": "indexed"}])
def test_indexed_edges_have_no_names_to_find(source):
    data = {**small(), "source": source, "train_data": {"data_root": "e.parquet"}}
    data["model"]["relations"] = [STAR]
    with pytest.raises(UserError, match=r"model\.relations: indexed edges .*list each"):
        parse_config(data)


FORMER = {
    "launch.duckdb_threads": ("launch.data_threads", 3),
    "training.early_stopping_metric": ("training.selection_metric", "mrr"),
}


@pytest.mark.parametrize("old", FORMER)
def test_a_renamed_field_is_accepted_by_its_former_name_with_one_warning_that_names_both(tmp_path, old):
    new, value = FORMER[old]
    section, _, name = old.partition(".")
    data = small() | {section: {name: value}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    for overrides in ([], [f"{old}={value}"], [f"{section}={{{name}: {value}}}"]):
        with pytest.warns(UserWarning, match=f"{old} is now named {new}") as seen:
            config = load_config(str(tmp_path / "c.yaml"), overrides)
        assert len({str(one.message) for one in seen}) == len({(one.filename, one.lineno) for one in seen}) == 1
        assert getattr(getattr(config, section), new.partition(".")[2]) == value
    with pytest.warns(UserWarning, match="is now named"):
        assert parse_config(data).to_yaml() == config.to_yaml()
    assert data == small() | {section: {name: value}}


def test_every_former_name_is_tried():
    assert set(FORMER) == set(RENAMED)


def test_an_override_replaces_the_file_whichever_of_a_fields_names_each_uses(tmp_path):
    path = tmp_path / "c.yaml"
    for in_file, override in (("duckdb_threads", "data_threads"), ("data_threads", "duckdb_threads")):
        path.write_text(yaml.safe_dump(small() | {"launch": {in_file: 3}}))
        with pytest.warns(UserWarning, match="is now named"):
            assert load_config(str(path), [f"launch.{override}=5"]).launch.data_threads == 5


def test_both_names_of_a_field_are_refused(tmp_path):
    both = {"duckdb_threads": 3, "data_threads": 4}
    with pytest.raises(UserError, match=r"c.yaml: launch.duckdb_threads is the old name of .*; remove launch.duckdb"):
        parse_config(small() | {"launch": both}, origin="c.yaml")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(small()))
    for overrides in (
        [f"launch.{name}={value}" for name, value in both.items()],
        [f"launch={yaml.safe_dump(both, default_flow_style=True)}"],
    ):
        with pytest.raises(UserError, match=r"launch.duckdb_threads.* is the old name of launch.data_threads"):
            load_config(str(path), overrides)


@pytest.mark.parametrize(
    ("name", "told"),
    [("relations", "is that of a table of the store"), ("u" * 300, "has 300 characters, more than 100; shorten it")],
)
def test_an_entity_type_may_not_be_called_like_a_table_or_too_long_for_a_folder(name, told):
    relations = [{"name": "r", "lhs": name, "rhs": name}]
    data = {"model": {"embeddings": {"tables": [{"name": name}]}, "relations": relations}}
    with pytest.raises(UserError, match=told):
        parse_config({**data, "source": {"path": "e.parquet"}})


def test_a_relation_may_not_be_called_half_a_character():
    tables = [{"name": "user"}]
    relations = [{"name": "likes\ud83d", "lhs": "user", "rhs": "user"}]
    data = {"model": {"embeddings": {"tables": tables}, "relations": relations}, "source": {"path": "e.parquet"}}
    with pytest.raises(UserError, match="without control characters or lone surrogates"):
        parse_config(data)
