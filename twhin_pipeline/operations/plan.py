"""Will it fit? Memory, traffic and disk of a training run, estimated before it starts.

Every figure is a formula over the configuration and the tables' sizes (docs/explanation/architecture.md); no data is
loaded. Which rank holds which rows is torchrec's plan, as in training. Counts of a step are upper bounds: rows that
repeat within a step are looked up once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import TableConfig
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.operations.rates import Rates, StepTime, Work, step_time
from twhin_pipeline.sharding.machine import threads_per_process
from twhin_pipeline.store import Store

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
CHUNK_BYTES = 150  # a chunk in a rank's memory: where its edges, pools and masks begin, and its place in the order
PROCESS_BYTES = (
    330 * 2**20
)  # of a rank's own: what torch, torchrec and MLflow write, and first steps' loops and buffers
SHARED_BYTES = 390 * 2**20  # of a node's: the pages of libraries, and the processes that start the ranks
LOOPS_BYTES = 110 * 2**20  # of a rank's own from its first step on: compiled loops, and threads' buffers
GPU_PROCESS_BYTES = 800 * 2**20  # of a rank whose step is on a GPU
TRUE_EDGE_BYTES = 20  # an edge and side of what `global_negatives: all` masks by: a row, at most a key and its start
DEGREE_BYTES = 24  # a row of what `sampled_per_step` draws by
BLOCK_BYTES = 24 * 2**20  # of scores with `global_negatives: all`; all_candidates.BLOCK_BYTES, which would load torch
SCORE_COPIES = 5  # scores, their masked copy, what the loss keeps for the backward pass, and two gradients
VALIDATION_COPIES = 3  # of scores and vectors, where nothing is kept for a backward pass
KEPT_COPIES = 2  # of vectors, in memory that steps have freed, in pieces that later ones do not fit
TILE_BYTES = 4 * 6_000_000  # of scores that an evaluation holds; relation_scores.CPU_TILE_ELEMENTS, which loads torch
RANKING_TILES = 19  # a ranking holds, with all that is made of them
WRITER_BYTES, ROWS_WRITTEN = 40 * 2**20, 65_536  # what Parquet takes; and model_files.BLOCK, of which it has two copies
VECTOR_COPIES = 6  # looked up, gathered, prepared, and the gradient of each
LOOKUP_COPIES = 2  # of these, looked up, and its gradient
CHUNK_COPIES = 2  # of these, read and written by losses that are taken chunk by chunk: prepared, and its gradient
EXCHANGES = 7  # of numbers of ids, ids, vectors, gradients, the operators' gradients, and two of small numbers
SHARED_EXCHANGES = 5  # where gradients lie, that rows are updated, the operators' gradients, and two of small numbers
OPERATIONS = 500  # of torch in a step, as its profiler counts them
EXCHANGE_COPIES = 4  # put in the order of ranks, received and put back in that of places; and the gradient of each


@dataclass(frozen=True)
class TablePlan:
    """One entity table over all ranks; sizes in bytes."""

    name: str
    rows: int
    origin: str
    """Where the number of rows comes from."""
    weights: int
    optimizer: int


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds; sizes in bytes."""

    rank: int
    rows: dict[str, int]
    tables: int
    """Weights and optimizer state of its shards."""
    step: int
    """Vectors and scores of one step, their gradients, and the batches read ahead."""
    evaluation: int
    """What evaluating on the validation set takes more than a step, and the vectors of others that rank 0 ranks by."""
    edges: int
    """Where chunks of edges and negatives are in their files; where all entities are candidates, what is masked."""
    writing: int
    """Vectors that are written to the model's files."""
    process: int
    """The process itself."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.tables + self.step + self.evaluation + self.edges + self.writing + self.process


@dataclass(frozen=True)
class Plan:
    """The estimate; sizes in bytes."""

    world_size: int
    ranks_per_node: int
    sharding: str
    tables: list[TablePlan]
    ranks: list[RankPlan]
    edges_per_step: int
    """Of all ranks."""
    steps: int | None
    """Of the whole run; None where the number of edges is not known."""
    sent_per_step: int
    """What a rank sends in one step: ids, vectors, their gradients, and the operators' gradients."""
    checkpoint: int
    checkpoints: int | None
    """How many are kept; None: all."""
    scoring: int
    """Memory of the blocks of scores of `twhin evaluate`."""
    shared: int
    """What a node's processes have together: libraries, and what starts the ranks."""
    time: StepTime | None = None
    """Of a step, at the rates given; None without rates."""

    @property
    def edges_per_second(self) -> float | None:
        """Of all ranks together; None without rates."""
        return None if self.time is None else self.edges_per_step / self.time.total

    @property
    def node(self) -> int:
        """The most that one node's processes hold together."""
        totals = sorted((rank.total for rank in self.ranks), reverse=True)
        return sum(totals[: self.ranks_per_node]) + self.shared

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values, the sums included."""
        ranks = [{**asdict(rank), "total": rank.total} for rank in self.ranks]
        return {**asdict(self), "ranks": ranks, "node": self.node, "edges_per_second": self.edges_per_second}


@dataclass(frozen=True)
class Step:
    """What one rank does in one step. Counts are upper bounds: a row that repeats is looked up once."""

    edges: int
    places: int
    """Ends of edges and candidates, before repeats are found."""
    looked_up: int
    """Rows of tables."""
    scores: int
    """Of queries with candidates; an edge's ends are queries of their own here, where edges of a kind share one."""
    scores_held: int
    """At a time."""
    ahead: int
    """Bytes of the batches read ahead."""

    def bytes(self, dim: int, copies: int = VECTOR_COPIES, score_copies: int = SCORE_COPIES) -> int:
        """Return the memory that it takes, with so many copies of the vectors and of the scores."""
        return copies * self.places * dim * 4 + (score_copies * 4 + 1) * self.scores_held + self.ahead


def operator_parameters(config: TwhinConfig) -> int:
    """Return how many parameters the operators of all relations have together."""
    dim = config.model.embedding_dim
    of = {"identity": 0, "linear": dim * dim, "affine": dim * dim + dim, "rotation": dim // 2}
    directions = 2 if config.model.reciprocal else 1
    return directions * sum(of.get(relation.operator, dim) for relation in config.model.relations)


def estimate(
    config: TwhinConfig,
    rows: Mapping[str, tuple[int, str]],
    world_size: int,
    num_edges: int | None = None,
    rates: Rates | None = None,
) -> Plan:
    """Estimate a run.

    Args:
        config: Everything but the tables' sizes.
        rows: Table to its number of rows, and where that is known from (`table_rows`).
        world_size: Ranks.
        num_edges: Training edges; None where they are not known.
        rates: What a rank does a second; with them the time of a step is estimated too.

    Raises:
        UserError: Ranks exchange vectors over a link whose rate is not among `rates`, the tables do not fit into
            `launch.hbm_gib`, or several ranks cannot train with a table's optimizer.
    """
    tables = [_table(table, *rows[table.name]) for table in config.model.embeddings.tables]
    rows_of = _rows_of_ranks(config, tables, world_size)
    per_row = {t.name: (t.weights + t.optimizer) / t.rows for t in tables}
    cpu = _on_cpu(config, rates)
    ranks_per_node = min(world_size, config.launch.nproc_per_node) if config.launch.nnodes > 1 else world_size
    sizes = {t.name: t.rows for t in tables}
    step = step_of(config, sizes)
    ranks = [
        RankPlan(
            rank=rank,
            rows=shard,
            tables=round(sum(per_row[name] * n for name, n in shard.items())),
            step=_step_bytes(config, step) if cpu else step.bytes(config.model.embedding_dim),
            evaluation=_evaluation(config, step, sizes, world_size, rank) if cpu else 0,
            edges=_edges(config, num_edges or 0, sizes, ranks_per_node),
            writing=(WRITER_BYTES + 2 * ROWS_WRITTEN * config.model.embedding_dim * 4) if cpu else 0,
            process=(PROCESS_BYTES if cpu else GPU_PROCESS_BYTES),
        )
        for rank, shard in enumerate(rows_of)
    ]
    dim = config.model.embedding_dim
    elsewhere = (world_size - 1) / world_size
    shared = _shares_memory(config, world_size, rates)
    # Row-wise, all-to-all: an id of 8 bytes goes out, a vector comes back, and its gradient goes out again.
    sent = 0 if shared else step.looked_up * (8 + 2 * dim * ELEMENT_BYTES[config.launch.exchange]) * elsewhere
    # A ring all-reduce of the operators' gradients sends each element twice.
    sent += 2 * operator_parameters(config) * 4 * elsewhere
    steps = work = None
    if num_edges is not None:
        per_epoch = -(-num_edges // (step.edges * world_size))
        steps = min(config.training.num_train_steps, per_epoch * config.training.num_epochs)
    if rates is not None:
        by_chunk = rates.by_chunk and chunks_apart(config)
        work = _work(config, step, sent, world_size, ranks_per_node, shared=shared, by_chunk=by_chunk)
    return Plan(
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        sharding=config.launch.sharding if world_size > 1 else "none (one rank)",
        tables=tables,
        ranks=ranks,
        edges_per_step=step.edges * world_size,
        steps=steps,
        sent_per_step=round(sent),
        checkpoint=sum(t.weights + t.optimizer for t in tables),
        checkpoints=None
        if config.training.checkpoint_max_to_keep is None
        else config.training.checkpoint_max_to_keep + 1,
        scoring=2 * config.evaluation.block_size * max(t.rows for t in tables) * 4,
        shared=SHARED_BYTES if cpu else 0,
        time=None if work is None or rates is None else step_time(work, rates),
    )


def _on_cpu(config: TwhinConfig, rates: Rates | None) -> bool:
    """Tell whether ranks train on CPUs, as far as that is known here: figures of a GPU's memory are of its own."""
    if config.launch.device != "auto" or rates is None:
        return config.launch.device != "cuda"
    return rates.by_chunk or rates.shared_memory


def _step_bytes(config: TwhinConfig, step: Step) -> int:
    """Return what a step takes on a CPU, with what earlier ones have left in pieces."""
    if chunks_apart(config):
        step = replace(step, scores_held=min(step.scores_held, _chunk_scores(config) * threads_per_process(config)))
    return LOOPS_BYTES + step.bytes(config.model.embedding_dim, VECTOR_COPIES + KEPT_COPIES)


def _chunk_scores(config: TwhinConfig) -> int:
    """Return how many scores a chunk has on one side."""
    data, size = config.train_data, config.negatives.chunk_size
    assert data.global_negatives != "all"
    return size * (min(data.in_batch_negatives, size) + data.global_negatives)


def _evaluation(config: TwhinConfig, step: Step, rows: Mapping[str, int], world_size: int, rank: int) -> int:
    """Return what evaluating during training takes on a CPU, beyond the memory of a step, which it uses again."""
    training, dim = config.training, config.model.embedding_dim
    if not _validates(config):
        return 0
    needed = 0
    if training.num_eval_steps:
        validation = config.model_copy(update={"train_data": config.validation_data})
        needed = step_of(validation, rows).bytes(dim, VALIDATION_COPIES, VALIDATION_COPIES)
    gathered = 0
    if training.ranks_everything and rank == 0:
        tails_only = training.selection_metric.startswith(("recall", "ndcg"))
        # Heads are moved by their operator, and the cosine compares scaled vectors: copies of all candidates.
        copied = max(rows.values()) * dim * 4 if not tails_only or config.model.comparator == "cosine" else 0
        needed = max(needed, TILE_BYTES * RANKING_TILES + copied)
        # Rank 0 takes all vectors of the entities; one rank alone has them.
        gathered = sum(rows.values()) * dim * 4 if world_size > 1 or config.model.max_norm is not None else 0
    return max(0, needed - _step_bytes(config, step)) + gathered


def _validates(config: TwhinConfig) -> bool:
    """Tell whether there may be validation edges."""
    return config.split.validation > 0 or config.split.strategy == "given" or not config.all_sources


def _shares_memory(config: TwhinConfig, world_size: int, rates: Rates | None) -> bool:
    """Tell whether ranks look rows up in each other's memory (shared_tables)."""
    cpu = config.launch.device == "cpu" or (rates is not None and rates.shared_memory)
    compiled = all(
        table.data_type == "fp32" and table.optimizer.name in ("rowwise_adagrad", "adagrad")
        for table in config.model.embeddings.tables
    )
    return cpu and compiled and config.launch.nnodes == 1 and world_size > 1


def chunks_apart(config: TwhinConfig) -> bool:
    """Tell whether a CPU's losses are taken chunk by chunk (`chunk_losses`): a sum of exponentials over products."""
    return (
        config.loss.name in ("softmax", "bsl")
        and config.model.comparator in ("dot", "cosine")
        and config.train_data.global_negatives != "all"
        and not config.runtime.enable_amp
    )


def _work(
    config: TwhinConfig,
    step: Step,
    sent: float,
    world_size: int,
    ranks_per_node: int,
    *,
    shared: bool,
    by_chunk: bool,
) -> Work:
    """Return what a rank does in a step: `sent` bytes go to ranks of its node and others alike."""
    dim = config.model.embedding_dim
    # A product forward and two backward, of two operations an element each; and an operator that is a matrix.
    flop = 3 * 2 * dim * step.scores
    if any(relation.operator in ("linear", "affine") for relation in config.model.relations):
        flop += 3 * 2 * dim * dim * step.edges
    # One process, or ranks that share memory, use rows where they lie: none is looked up first, nor its gradient handed
    # back.
    in_place = world_size == 1 or shared
    copies = VECTOR_COPIES - LOOKUP_COPIES if in_place else VECTOR_COPIES + EXCHANGE_COPIES
    copies -= CHUNK_COPIES * by_chunk
    exchanges = SHARED_EXCHANGES if shared else EXCHANGES
    beyond = sent * (world_size - ranks_per_node) / max(world_size - 1, 1)
    return Work(
        flop=flop,
        # What is copied is read and written.
        passed=2 * 4 * (copies * step.places * dim + (0 if by_chunk else SCORE_COPIES * step.scores)),
        row_bytes=step.looked_up * dim * 4,
        place_bytes=step.places * dim * 4,
        within=sent - beyond,
        beyond=beyond,
        exchanges=exchanges if world_size > 1 else 0,
        operations=OPERATIONS,
    )


def table_rows(
    config: TwhinConfig, store: Store, snapshot: str | None, counts: Mapping[str, int]
) -> dict[str, tuple[int, str]]:
    """Return each table's rows and where the number is from: `counts`, else `num_embeddings`, else its vocabulary.

    Raises:
        UserError: `counts` names no table, or a table's size is known from nowhere.
    """
    rows: dict[str, tuple[int, str]] = {}
    for name, count in counts.items():
        if name not in config.model.table_names:
            raise UserError(f"--rows {name}={count}: {unknown('table', name, config.model.table_names)}")
        rows[name] = (count, "--rows")
    missing = []
    for table in config.model.embeddings.tables:
        asset = f"vocabulary/{table.name}"
        if table.name in rows:
            continue
        if table.num_embeddings is not None:
            rows[table.name] = (table.num_embeddings, "num_embeddings")
        elif snapshot is not None and store.exists(asset, snapshot):
            rows[table.name] = (store.manifest(asset, snapshot).rows, f"vocabulary {snapshot}")
        else:
            missing.append(table.name)
    if missing:
        flags = " ".join(f"--rows {name}=100000" for name in missing)
        raise UserError(
            f"no vocabulary and no num_embeddings for {', '.join(missing)}: make the vocabulary with "
            f"`twhin ingest` and `twhin vocabulary`, or give numbers, such as {flags}"
        )
    return rows


def training_edges(store: Store, snapshot: str | None) -> int | None:
    """Return how many edges a snapshot trains on, as far as the store knows: its positives, else its raw edges."""
    for asset in ("training_set/positives", "raw_edges") if snapshot is not None else ():
        if store.exists(asset, str(snapshot)):
            return store.manifest(asset, str(snapshot)).rows
    return None


def _table(table: TableConfig, rows: int, origin: str) -> TablePlan:
    elements = rows * table.embedding_dim
    # fbgemm keeps optimizer state in float32 whatever the weights' type.
    state = {
        "sgd": 0,
        "rowwise_adagrad": 4 * rows,
        "adagrad": 4 * elements,
        "adam": 8 * elements,
        "rmsprop": 4 * elements + 4 * rows,
    }[table.optimizer.name]
    return TablePlan(table.name, rows, origin, elements * ELEMENT_BYTES[table.data_type], state)


def _rows_of_ranks(config: TwhinConfig, tables: list[TablePlan], world_size: int) -> list[dict[str, int]]:
    """Return each rank's rows of each table, as torchrec's planner distributes them in training."""
    rows = {table.name: table.rows for table in tables}
    if world_size == 1:
        return [rows]
    from twhin_pipeline.sharding.planner import rows_of_ranks  # loads torch and torchrec

    return rows_of_ranks(config, rows, world_size)


def step_of(config: TwhinConfig, rows: Mapping[str, int]) -> Step:
    """Count what one rank does in one step, with tables of so many `rows`."""
    data = config.train_data
    chunks = max(1, data.per_replica_batch_size // config.negatives.chunk_size)
    edges = chunks * config.negatives.chunk_size
    corrupted = _corrupted_tables(config)
    if data.global_negatives == "all":
        # All rows of the types of which candidates are, or a step's sample; queries are scored with them by the block.
        drawn = {name: min(rows[name], data.sampled_per_step or rows[name]) for name in rows}
        pool = sum(drawn[name] for name in set().union(*corrupted.values()))
        scores = sum(edges * max(drawn[name] for name in names) for names in corrupted.values())
        held = max(BLOCK_BYTES // 4, max(drawn.values()))
    else:
        pool = chunks * data.global_negatives * len(corrupted)
        window = min(data.in_batch_negatives, config.negatives.chunk_size)
        # Edges that keep the same entity share a row of scores; here each has its own.
        scores = held = len(corrupted) * edges * (window + data.global_negatives)
    places = 2 * edges + pool
    return Step(
        edges=edges,
        places=places,
        looked_up=min(places, sum(rows.values())),
        scores=scores,
        scores_held=held,
        # A batch read ahead holds an index of 8 bytes a place, its unique ids, and a weight an edge.
        ahead=config.launch.prefetch_batches * (16 * places + 4 * edges),
    )


def _corrupted_tables(config: TwhinConfig) -> dict[str, set[str]]:
    """Return the sides that some relation corrupts, and the tables of the candidates of each such side."""
    tables: dict[str, set[str]] = {}
    for relation, sides in zip(config.model.relations, config.corrupted_sides.values(), strict=True):
        for side in sides:
            tables.setdefault(side, set()).add(getattr(relation, side))
    return tables


def _edges(config: TwhinConfig, num_edges: int, rows: Mapping[str, int], ranks_per_node: int) -> int:
    """Return the bytes of what a rank knows of all chunks, and of what masks stand for, which a node's ranks share."""
    chunks = -(-num_edges // config.negatives.chunk_size)
    data = config.train_data
    masked = 2 * TRUE_EDGE_BYTES if data.global_negatives == "all" and config.negatives.mask == "known" else 0
    drawn = DEGREE_BYTES * sum(rows.values()) if data.sampled_per_step is not None else 0
    return chunks * CHUNK_BYTES + num_edges * masked // ranks_per_node + drawn


def parse_rows(flags: list[str]) -> dict[str, int]:
    """Read `table=number` pairs. Raises UserError where one is not of that form."""
    rows = {}
    for text in flags:
        name, _, number = text.partition("=")
        if not number.replace("_", "").isdigit() or int(number) < 1:
            raise UserError(f"--rows {text!r} must look like package=70000")
        rows[name] = int(number)
    return rows
