"""How training runs, where it runs, and what comes out of it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from twhin_pipeline.config.base import Section, Seed
from twhin_pipeline.config.model import LOSS_NAMES
from twhin_pipeline.config.schedulers import KubernetesConfig, SlurmConfig
from twhin_pipeline.errors import unknown


class RuntimeConfig(Section):
    """Numerics of the device."""

    enable_amp: bool = False
    """Score in bfloat16 (autocast); tables and loss stay as they are."""
    enable_tensorfloat32: bool = False
    """Let CUDA matrix products use TensorFloat-32."""
    wandb: dict[str, Any] | None = None
    """Accepted, and not used: runs are tracked with MLflow. A warning says so."""


SAMPLED_METRICS = ("loss", "auc", "rce", "mrr")
RANKING_METRIC = re.compile(r"filtered_mrr|(filtered_hits|recall|ndcg)@[1-9]\d*")


PREVIOUS = "previous"
"""In the place of a path in `training.initial_checkpoint_dir`."""


class TrainingConfig(Section):
    """The training loop."""

    save_dir: str | None = None
    """Where checkpoints go. Left out: beside the model, in the store."""
    num_train_steps: int = Field(10_000, ge=1)
    """Stop after so many steps, even inside an epoch; a log line says so when this comes before `num_epochs`."""
    num_epochs: int = Field(1, ge=1)
    """Passes over the training edges."""
    initial_checkpoint_dir: str | None = None
    """Start from the vectors of an earlier model: a store's snapshot, matched by id, or a checkpoint folder, by row.
    `previous` stands for this store: the newest release of an older snapshot that consumers got and that was not rolled
    back from; the first day, which has none, starts at random."""
    new_ids: Literal["neighbors", "random"] = "neighbors"
    """Where an id starts that the model in `initial_checkpoint_dir` has not trained. `neighbors`: at the mean of what
    the relations of its training edges want, given their known ends; without such an edge, at the mean of its type.
    `random`: as in a first training. A checkpoint folder, which is taken over by row, has no new ids."""
    carry_optimizer_state: bool = False
    """Write the state of the optimizers beside the model (4 bytes a row, or as much as the vectors and more), and take
    over that of the model in `initial_checkpoint_dir` where it has it and the optimizer is the same; new entities start
    afresh. Old entities then move in small steps from the first one on: the first loss is lower, but evaluation was
    better with it in some trials and worse in others."""
    checkpoint_every_n: int = Field(1_000, ge=1)
    """Steps between checkpoints; one is also written at the end, and when the run is cancelled."""
    checkpoint_max_to_keep: int | None = Field(None, ge=1)
    """Keep so many of the latest checkpoints, and the best. Left out: all."""
    train_log_every_n: int = Field(1_000, ge=1)
    """Steps between log lines and MLflow points."""
    num_eval_steps: int = 16_384
    """Batches of the validation set to evaluate against sampled candidates; below 0, all; 0, none."""
    eval_log_every_n: int = Field(5_000, ge=1)
    """Steps between evaluations on the validation set; one is also made at the end."""
    eval_timeout_in_s: float = Field(3_600, gt=0)
    """An evaluation stops after so many seconds, and says how far it came."""
    gradient_accumulation: int | None = Field(None, ge=1)
    """Only 1 is taken: tables step inside the backward pass, so micro-batches would each be a step."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop when so many evaluations in a row did not better `selection_metric`. Left out: never."""
    eval_every_n_epochs: int | None = Field(None, ge=1)
    """Evaluate on the validation set at the end of every so many epochs, in place of `eval_log_every_n`."""
    selection_metric: str = "loss"
    """The validation metric that chooses the best checkpoint, which becomes the model, and that early stopping watches.
    Against the sampled candidates: `loss`, `auc`, `rce`, `mrr`. As `evaluation` measures it overall, against every
    entity: `filtered_mrr`, `filtered_hits@k` (of the sides that relations replace), `recall@k` or `ndcg@k` (of tails).
    Test edges play no part. With several processes the first one ranks, and holds the tables meanwhile."""
    eval_max_edges: int = Field(5_000, ge=1)
    """Validation edges that such a metric ranks at most, drawn by `evaluation.seed`: one of each relation and the rest
    in proportion (of retrieval, heads with all their edges)."""
    refit: bool = True
    """After the evaluation train once more, on all edges, held-out ones included, for the epochs that validation chose,
    and export that model; false exports the one that was evaluated. It takes as long as the training before."""
    seed: Seed = 0
    """Seed of initial vectors and of the order of chunks."""

    @model_validator(mode="after")
    def _no_accumulation(self) -> TrainingConfig:
        if self.gradient_accumulation not in (None, 1):
            raise ValueError(
                "gradient_accumulation above 1 cannot be done with fused optimizers (the tables would step on each "
                "micro-batch); raise train_data.per_replica_batch_size instead"
            )
        return self

    @field_validator("selection_metric")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if value not in SAMPLED_METRICS and not RANKING_METRIC.fullmatch(value):
            ranking = ("filtered_mrr", "filtered_hits@10", "recall@20", "ndcg@20")
            raise ValueError(f"{unknown('metric', value, (*SAMPLED_METRICS, *ranking))} (or another k from 1)")
        return value

    @property
    def ranks_everything(self) -> bool:
        """Whether `selection_metric` ranks the validation edges against every entity."""
        return self.selection_metric not in SAMPLED_METRICS


class LossConfig(Section):
    """What is minimized."""

    name: str = "softmax"
    """`bce`: weighted binary cross-entropy (published). `softmax`: cross-entropy of the edge among its candidates.
    `margin`: margin ranking. `self_adversarial`: RotatE's negative sampling. `bsl`: bilateral softmax, which weighs
    positives and negatives by temperatures of their own."""
    negative_weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """For `bce`: the weight of all of an edge's negatives together, its positive's being 1."""
    margin: float = Field(1.0, ge=0, allow_inf_nan=False)
    """For `margin`: by how much an edge shall score above each candidate. For `self_adversarial`: what is added to
    every score (RotatE's gamma), so that a distance below it counts as near."""
    adversarial_temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    """For `self_adversarial`: candidates weigh softmax(temperature * score); 0 weighs them alike."""
    positive_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """For `bsl`: the temperature of positives' scores, after `model.temperature`."""
    negative_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """For `bsl`: the temperature of candidates' scores, after `model.temperature`."""
    log_q: bool = False
    """Subtract from each candidate's score the log of how often it is expected among the candidates, so that the loss
    estimates that against all entities (Bengio and Senécal, 2008; Yi et al., 2019); for `softmax` and `bsl`."""

    @model_validator(mode="after")
    def _known(self) -> LossConfig:
        if self.name not in LOSS_NAMES:
            raise ValueError(f"name: {unknown('loss', self.name, LOSS_NAMES)}")
        if self.log_q and self.name not in ("softmax", "bsl"):
            raise ValueError(f"log_q corrects softmax and bsl; {self.name} has no sum over all entities to estimate")
        return self


Baseline = Literal["popularity", "item_knn", "als"]


class EvaluationConfig(Section):
    """What is measured, and what must be reached."""

    hits_at: list[Annotated[int, Field(ge=1)]] = Field(default=[1, 3, 10], min_length=1)
    """k of Hits@k."""
    recall_at: list[Annotated[int, Field(ge=1)]] = [10, 20]
    """k of Recall@k and NDCG@k, which always rank the whole catalogue; `[]` leaves them out."""
    candidates: int | None = Field(None, ge=1, le=2**31)
    """Rank against so many sampled entities of the type; left out, against all."""
    max_edges: int | None = Field(None, ge=1)
    """Rank at most so many test edges a relation, drawn by `seed`; left out, all."""
    auc_negatives: int = Field(10, ge=1, le=10_000)
    """Sampled negatives an edge for AUC, RCE and calibration. They state what a probability means: that of an edge
    where each real edge comes with so many pairs of the same head and a random tail. The base rate is 1 in 1 +
    `auc_negatives`."""
    floors: dict[str, float] = {}
    """Least values of overall metrics, such as `{filtered_mrr: 0.1}`; the check on `evaluation` fails below."""
    baselines: list[Baseline] = ["popularity", "item_knn", "als"]
    """Which baselines rank the same edges: `popularity` (always measured, it costs nothing), `item_knn` and `als`,
    which take some seconds (metrics.md)."""
    baseline_edges: int | None = Field(20_000, ge=1)
    """Test edges that `item_knn` and `als` rank at most, drawn by `seed` as heads with all their edges; the model's
    figures on the same edges stand beside them. Left empty, all."""
    must_beat: list[Baseline] = []
    """Baselines that the model must not be below; else the check on `evaluation` fails. It compares Recall at the
    largest k of `recall_at` (without one, filtered MRR), of all relations and of each one with 200 test edges or more.
    With `[]` the evaluation warns only."""
    must_beat_tolerance: float = Field(0.0, ge=0, lt=1)
    """The share of a baseline's figure by which the model may be below it."""
    block_size: int = Field(512, ge=1, le=1_000_000)
    """Most edges ranked at a time; memory is at most this times the entities of the type times 4 bytes (on a CPU fewer
    are taken where that is faster)."""
    seed: Seed = 0
    """Seed of sampled edges and candidates."""

    @model_validator(mode="after")
    def _known_floors(self) -> EvaluationConfig:
        ranks = ["mrr", "mean_rank", *(f"hits@{k}" for k in self.hits_at)]
        known = [f"{kind}_{name}" for kind in ("filtered", "raw") for name in ranks]
        known += [f"{name}@{k}" for k in self.recall_at for name in ("recall", "ndcg")]
        known += ["auc", "rce", "calibrated_rce"]
        for name in self.floors:
            if name not in known:
                raise ValueError(f"floors: {unknown('metric', name, known)}")
        return self

    @model_validator(mode="after")
    def _measured_baselines(self) -> EvaluationConfig:
        for name in self.must_beat:
            if name != "popularity" and name not in self.baselines:
                raise ValueError(f"must_beat: {name} is not measured; add it to evaluation.baselines")
        return self

    @property
    def chief_metric(self) -> str:
        """The metric by which the model is compared with the baselines."""
        return f"recall@{max(self.recall_at)}" if self.recall_at else "filtered_mrr"


class PostgresConfig(Section):
    """A copy of each release in PostgreSQL with pgvector."""

    url_variable: str = Field("TWHIN_POSTGRES", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """The environment variable that has the server's address, such as `postgresql://user:password@host/database`.
    Where it is not set, libpq's own (`PGHOST`, `PGDATABASE`, …) say it. A configuration has no passwords."""
    schema_name: str = Field("twhin", pattern=r"^[a-z_][a-z0-9_]{0,29}$")
    """The schema of the views. Each release's tables are in a schema of their own, named after it and the release."""
    data_type: Literal["fp32", "fp16"] = "fp32"
    """`fp32`: pgvector's `vector`, `fp16`: its `halfvec`, which takes half the space."""
    index: Literal["hnsw", "none"] = "hnsw"
    """The index on each entity type's vectors, for the comparator's distance."""
    relations: list[str] = []
    """Relations whose queries are copied too, as `wants_<relation>`: each head's vector as the relation's operator
    makes it, so that the nearest tails to it are the head's best ones."""
    keep: int = Field(2, ge=1)
    """So many of the latest releases stay, that of the views included."""


class ExportConfig(Section):
    """How embedding tables are written."""

    postgres: PostgresConfig | None = None
    """Copy each release into PostgreSQL too; views there switch when one is promoted. Left out: no."""

    data_type: Literal["fp32", "fp16"] = "fp32"
    """Element type of the exported vectors."""
    normalize: bool = False
    """Scale each vector to length 1 (for indexes that know dot products only, with the cosine comparator)."""
    compatibility: Literal["linear", "orthogonal", "none"] = "linear"
    """Which map from the new vectors into the space of the current release is published with them, for consumers that
    were trained on those (`load_model(…, compatible_with=…)`). `orthogonal` keeps lengths and angles."""
    rows_per_file: int = Field(262_144, ge=1, le=2**31)
    """Rows of one Parquet file (128 MiB of 128 numbers). Several files are written at once."""


SECRETS = re.compile(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
"""In names of environment variables whose values must not be written to tables, logs or MLflow."""


class LaunchConfig(Section):
    """Processes and memory."""

    kind: Literal["local", "slurm", "kubernetes"] = "local"
    """Who starts the training: this machine, a job of Slurm, or a JobSet on Kubernetes."""
    nproc_per_node: int = Field(1, ge=1, le=1_024)
    """Ranks on a node."""
    nnodes: int = Field(1, ge=1, le=65_536)
    """Nodes."""
    node_rank: int = Field(0, ge=0)
    """This node's number, where `nnodes` is above 1 and `kind` is `local`."""
    rdzv_endpoint: str | None = None
    """host:port of the first node, where `nnodes` is above 1 and `kind` is `local`."""
    max_restarts: int = Field(0, ge=0, le=1_000)
    """How often a training is started again where a process or a node was lost. It goes on from the last checkpoint;
    the nodes that are left wait for one that comes back with the same command."""
    join_timeout_s: float = Field(600, gt=0)
    """How long a node waits for the others to come, or to come back, where `nnodes` is above 1; seconds."""
    slurm: SlurmConfig | None = None
    """What a job of Slurm asks for; only with `kind: slurm`."""
    kubernetes: KubernetesConfig | None = None
    """The pods on Kubernetes; with `kind: kubernetes`, and only then."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA (NCCL) where it is there, else the CPU (gloo)."""
    threads_per_process: int | None = Field(None, ge=1, le=1_024)
    """Threads of a rank's matrix products; left out, the node's cores divided by its ranks."""
    sharding: Literal["row_wise", "table_wise", "auto"] = "row_wise"
    """How tables are laid on ranks: a part of the rows of each table on each rank; whole tables on a rank each; or, for
    each table, which of the two torchrec's planner expects to be faster."""
    hbm_gib: float | None = Field(None, gt=0)
    """Memory a rank's tables may take, for the sharding planner; left out, what the device has."""
    uvm_cache: float | None = Field(None, gt=0, le=1)
    """Tables that do not fit into a GPU's memory stay in the host's, and the GPU keeps this share of their rows in a
    cache (fbgemm's UVM caching). Left out: they have to fit."""
    exchange: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Element type of the vectors and gradients that ranks send each other. Tables, losses and updates stay as they
    are. Ranks on the CPU know no `bf16`, and send nothing to ranks of their own machine."""
    prefetch_batches: int = Field(4, ge=1, le=10_000)
    """Batches read ahead in the background."""
    reader_threads: int | None = Field(None, ge=1, le=1_024)
    """Threads of a rank that assemble batches. Left out: one on a CPU; for a GPU as many as the rank has, eight at
    most."""
    env: dict[str, str] = {}
    """Environment variables of the training processes."""
    duckdb_memory_limit: str = "4GB"
    """Memory DuckDB may take in data preparation and checks; beyond it, it spills to disk."""
    data_threads: int | None = Field(None, ge=1, le=1_024)
    """Threads of data preparation and of the export: DuckDB's, and those of our own loops. Left out: all cores."""

    @model_validator(mode="after")
    def _nodes(self) -> LaunchConfig:
        for kind in ("slurm", "kubernetes"):
            if getattr(self, kind) is not None and self.kind != kind:
                raise ValueError(
                    f"launch.{kind} is set and kind is {self.kind}; set kind: {kind}, or remove the section"
                )
        if self.kind == "kubernetes" and self.kubernetes is None:
            raise ValueError("kind: kubernetes needs the section launch.kubernetes with image, the image to run")
        if self.kind != "local":
            if self.node_rank or self.rdzv_endpoint is not None:
                raise ValueError(f"kind: {self.kind} sets node_rank and rdzv_endpoint itself; remove them")
            return self
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ValueError("nnodes above 1 needs rdzv_endpoint, the host:port of the first node")
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank {self.node_rank} must be below nnodes {self.nnodes}")
        for name in self.env:
            if SECRETS.search(name):
                raise ValueError(f"env: {name} looks like a secret, and a run keeps its configuration; set it outside")
        return self
