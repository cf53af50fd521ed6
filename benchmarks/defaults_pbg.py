"""PyTorch-BigGraph by its own defaults, for the column PBG of `defaults.py --pbg`.

It trains on the training edges of a store, in an environment of its own (`peers/environments.py`), and our evaluation
ranks its vectors on the test edges of that store, with the same candidates, filters and metrics.

Its settings are the defaults of its `ConfigSchema` (ranking loss with margin .1, cosine, rate .01, 50 in-batch and 50
uniform negatives, batches of 1,000 edges, a global vector of each entity type), except for these:

- Dimension: it has no default; our recipe's.
- Epochs: its default is one, which would be unfair; our recipe's number. Nothing chooses an epoch by
  validation edges, as ours does; the last one counts.
- Operator: its default moves nothing, so all relations would be one; `translation`.
- `eval_fraction`: it withholds 5 % of the edges by default; 0, so that it trains on the same edges as ours.
- Workers: one a core by default; `launch.threads_per_process` where that is set.

Its workers take their seeds from their process ids, so two trainings differ a little.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from default_graphs import MRR, RECALL
from peers.environments import peer_python

from twhin_pipeline.config import TwhinConfig, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.baselines import FactorScores
from twhin_pipeline.evaluation.held_out import Edges, HeldOut, Questions, read_edges, read_filters
from twhin_pipeline.evaluation.rank_metrics import distinct, joined, rank_metrics, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts, Scores
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.store import Store, database
from twhin_pipeline.words import BOTH, SIDES, Side

Array = np.ndarray[Any, Any]
Rows = list[dict[str, Any]]
Say = Callable[[str], None]

NAME = "PyTorch-BigGraph"
FOLDER = Path(__file__).resolve().parent
ENVIRONMENTS = FOLDER.parent / ".twhin" / "benchmarks" / "training"
"""Where `training.py` has the same environment."""
K = 20


def interpreter(say: Say) -> Path | None:
    """Return the interpreter of PyTorch-BigGraph's environment; None, and a line says so, where it cannot be made."""
    try:
        return peer_python(ENVIRONMENTS, NAME)
    except subprocess.CalledProcessError as error:
        reason = f"{Path(error.cmd[0]).name} {' '.join(error.cmd[1:4])} … ended with exit code {error.returncode}"
    except OSError as error:
        reason = str(error)
    say(f"PBG: left out, {NAME} cannot be installed in {ENVIRONMENTS}: {reason}")
    return None


def measure(
    python: Path, config: TwhinConfig, store: Store, snapshot: str, home: Path, say: Say
) -> tuple[Rows, dict[str, float]]:
    """Train PyTorch-BigGraph on the training edges of a store, and rank its test edges; see `ranked`.

    Args:
        python: PyTorch-BigGraph's interpreter.
        config: That of the store's run; its recipe is applied here.
        store: Where the edges and vocabularies are.
        snapshot: Of these.
        home: Gets its files and its log.
        say: Prints a line.

    Raises:
        UserError: It failed, or ours ranked a sample of the test edges.
    """
    config = relations.recipe(config, store, snapshot).config
    if config.evaluation.max_edges is not None or config.evaluation.candidates is not None:
        raise UserError("--pbg: ranks all test edges; leave evaluation.max_edges and evaluation.candidates out")
    started = time.monotonic()
    vectors, translations = train(python, config, store, snapshot, home)
    trained = time.monotonic() - started
    scores = [
        cosine_scores(vectors[relation.lhs], vectors[relation.rhs], translation)
        for relation, translation in zip(config.model.relations, translations, strict=True)
    ]
    epochs, dim = config.training.num_epochs, config.model.embedding_dim
    say(f"PBG: {epochs} epochs of dimension {dim} in {trained:,.0f} s")
    return ranked(config, store, snapshot, scores)


def train(python: Path, config: TwhinConfig, store: Store, snapshot: str, home: Path) -> tuple[dict[str, Array], Array]:
    """Return each entity type's vectors, float32 `[N, D]`, and the relations' translations of tails `[R, D]`.

    Raises:
        UserError: It failed; names its log.
    """
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    edges = store.read("training_set/positives", snapshot, ["lhs", "rel", "rhs"])
    np.savez(home / "edges.npz", **{name: edges.column(name).to_numpy() for name in edges.column_names})
    entities = {name: store.manifest(f"vocabulary/{name}", snapshot).rows for name in config.model.table_names}
    work = {
        "home": str(home),
        "edges": str(home / "edges.npz"),
        "entities": entities,
        "relations": [(relation.name, relation.lhs, relation.rhs) for relation in config.model.relations],
        "settings": {
            "dimension": config.model.embedding_dim,
            "num_epochs": config.training.num_epochs,
            "workers": config.launch.threads_per_process,
        },
    }
    (home / "work.json").write_text(json.dumps(work), encoding="utf-8")
    log = home / "pbg.log"
    with log.open("w", encoding="utf-8") as out:
        command = [str(python), str(FOLDER / "peers" / "pbg.py"), str(home / "work.json")]
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=home).returncode
    if code:
        last = (log.read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing"])[-1]
        raise UserError(f"{NAME} ended with exit code {code}; see {log}: {last}")
    with np.load(home / "vectors.npz") as file:
        return {name: file[name] for name in entities}, file["translation"]


def cosine_scores(heads: Array, tails: Array, translation: Array) -> FactorScores:
    """Return one relation's scores: the cosine between a head's vector and a tail's, which the operator has moved.

    Args:
        heads: float `[heads, D]`, the global vector of the type added.
        tails: Likewise, `[tails, D]`.
        translation: float `[D]`.
    """
    return FactorScores(_unit(heads), _unit(tails + translation))


def _unit(vectors: Array) -> Array:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, np.finfo(np.float32).tiny), np.float32)


def ranked(config: TwhinConfig, store: Store, snapshot: str, scores: Sequence[Scores]) -> tuple[Rows, dict[str, float]]:
    """Rank all test edges of a store as its evaluation does, by other scores.

    Args:
        config: The configuration, relations resolved.
        store: Where the edges and vocabularies are.
        snapshot: Of these.
        scores: Of each relation.

    Returns:
        Rows as of the table `evaluation`: of each relation that has a test edge Recall@20 of tails, and filtered MRR
        of heads, of tails and of both. And these two of all relations, as in the details of that table.
    """
    held_out = HeldOut.open(store, snapshot)
    sizes = {name: store.manifest(f"vocabulary/{name}", snapshot).rows for name in config.model.table_names}
    sets = {name: CandidateSet(size, present_rows(store, snapshot, name)) for name, size in sizes.items()}
    with database.connect(config, store) as con:
        edges = dict(enumerate(read_edges(con, held_out.test, len(config.model.relations))))
        edges = {number: one for number, one in edges.items() if len(one["lhs"])}
        known = {side: read_filters(con, held_out.known, side, edges) for side in SIDES}
        seen = read_filters(con, held_out.seen, "rhs", edges)
    ranks: dict[tuple[int, Side], Array] = {}
    retrieved: dict[int, Counts] = {}
    for number, one in edges.items():
        relation = config.model.relations[number]
        for side, name in zip(SIDES, (relation.lhs, relation.rhs), strict=True):
            filters = [known[side][number], *([seen[number]] if side == "rhs" else [])]
            counts = Questions.of(side, one, sets[name], filters).rank(scores[number], config.evaluation.block_size)
            ranks[number, side] = counts[1].ranks
        retrieved[number] = counts[2]
    rows: Rows = []
    for number, one in edges.items():
        values = {("rhs", RECALL): _recall([one], [retrieved[number]])}
        for word, sides in (("lhs", SIDES[:1]), ("rhs", SIDES[1:]), (BOTH, SIDES)):
            values[word, MRR] = _mrr([ranks[number, side] for side in sides])
        row = {"relation": config.model.relation_names[number], "edges": len(one["lhs"])}
        rows += [{**row, "side": word, "metric": metric, "value": value} for (word, metric), value in values.items()]
    corrupted = list(config.corrupted_sides.values())
    asked = [ranks[number, side] for number in edges for side in corrupted[number]]
    overall = {RECALL: _recall(list(edges.values()), list(retrieved.values())), MRR: _mrr(asked)} if edges else {}
    return rows, overall


def _recall(edges: Sequence[Edges], counts: list[Counts]) -> float:
    return retrieval_metrics(distinct(one["lhs"] for one in edges), joined(counts), [K])[RECALL]


def _mrr(ranks: list[Array]) -> float:
    return rank_metrics("filtered", np.concatenate(ranks), [])[MRR]
