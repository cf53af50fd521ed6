"""Oracles of generated shops: what recommends best if one knows what the log was drawn from, or a part of it.

`ORACLE` knows all, each user's two communities and their shares too, which nobody can know from a few events. What can
be known of them is in `INFERRED`: the same oracle, but for a user's communities and shares, of which it has the
posterior distribution, given the user's training edges. It still knows everything else: each product's community and
popularity, how likely each event is, and the first community of everyone whom the user follows or is followed by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.stats
from default_graphs import ALL
from scipy.special import logsumexp, softmax

from twhin_pipeline.operations.shop import (
    AFTER,
    CONVERSION,
    NEAR,
    OUTSIDE,
    SHARE_OF_FIRST,
    Truth,
    oracle_scores,
    parents_of,
)
from twhin_pipeline.store import Store

Array = np.ndarray[Any, Any]
ORACLE, INFERRED = "oracle", "inferred"

K = 20
CELLS = 4_000_000
"""Elements of scores at a time."""
SHARES = scipy.stats.beta.ppf((np.arange(16) + 0.5) / 16, *SHARE_OF_FIRST)
"""The shares of a user's first community, each as likely as the others."""


def recalls(truth: Truth, store: Store, snapshot: str, relations: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the Recall@20 of both oracles, by relation and of all.

    The list is the catalogue (all products of the vocabulary) without the user's training and validation edges of the
    relation; the mean is over users with a test edge, and in `all` over users and relations.

    Args:
        truth: What the log was drawn from.
        store: Has the training set and what is held out.
        snapshot: Which one.
        relations: Their names, in the model's order.
    """
    users, products = (
        _positions(store, snapshot, *of) for of in (("user", truth.user_ids), ("product", truth.product_ids))
    )
    edges = [
        np.stack([store.read(asset, snapshot)[column].to_numpy() for column in ("rel", "lhs", "rhs")], 1)
        for asset in ("training_set/positives", "held_out/validation", "held_out/test")
    ]
    trained = {name: edges[0][edges[0][:, 0] == number, 1:] for number, name in enumerate(relations)}
    taste = Taste(truth, trained, users, products)
    scorers: dict[str, Callable[[Array, str], Array]] = {
        ORACLE: lambda some, name: oracle_scores(truth, users[some], name)[:, products],
        INFERRED: taste.scores,
    }
    return {of: _recall(scores, edges, relations, len(products)) for of, scores in scorers.items()}


def _recall(
    scores: Callable[[Array, str], Array], edges: Sequence[Array], relations: Sequence[str], products: int
) -> dict[str, float]:
    """Return the Recall@20 by relation and of all: `scores` of rows of users and a relation are `[n, products]`."""
    each = {}
    for number, name in enumerate(relations):
        train, validation, test = (np.unique(part[part[:, 0] == number, 1:], axis=0) for part in edges)
        if not len(test):
            continue
        heads = np.unique(test[:, 0])
        known = np.concatenate([train, validation])
        known = known[np.isin(known[:, 0], heads)]
        found = []
        step = max(1, CELLS // products)
        for start in range(0, len(heads), step):
            some = heads[start : start + step]
            found.append(expected_recall(scores(some, name), _of(known, some), _of(test, some), K))
        each[name] = np.concatenate(found)
    means = {name: float(values.mean()) for name, values in each.items()}
    return {**means, ALL: float(np.concatenate(list(each.values())).mean())} if each else {}


def _others(logs: Array) -> Array:
    """Return the logarithm of the sum of all others along axis 1, `[n, C, M]`, given logarithms: one may be most."""
    largest = np.argmax(logs, axis=1, keepdims=True)
    without = logs.copy()
    np.put_along_axis(without, largest, -np.inf, axis=1)
    rest = logsumexp(without, axis=1, keepdims=True)
    total = np.logaddexp(rest, np.take_along_axis(logs, largest, axis=1))
    # Of all but the largest, each is half of the sum at most.
    others = total + np.log1p(-np.exp(np.minimum(without - total, -np.log(2))))
    np.put_along_axis(others, largest, rest, axis=1)
    return np.asarray(others)


class Taste:
    """The posterior distribution of users' communities `a` (first) and `b`, and of the share of `a`, `m`.

    Events are draws from the log's distribution. The chance of a community among first events is `background / C`, and
    for `a` and `b` larger by the factors `1 + (1 - background) m C / background` and the same with `1 - m`. So the
    likelihood is a product of a term of `a` and one of `b` for each `m`, and no pair has to be looked at alone.
    """

    def __init__(self, truth: Truth, trained: dict[str, Array], users: Array, products: Array) -> None:
        """Count what the posterior goes by.

        Args:
            truth: What the log was drawn from; at least two communities, with some background.
            trained: By relation, the training edges as rows, int64 `[E, 2]`; those of `follows` join users.
            users: Where each row of a user is in `truth.user_ids`.
            products: Likewise of products.
        """
        self.truth = truth
        self.communities = communities = int(truth.product_community.max()) + 1
        community = truth.product_community[products]
        within = truth.popularity / np.bincount(truth.product_community, truth.popularity)[truth.product_community]
        self.community, self.within = community, within[products]

        def count(name: str) -> Array:
            """Return each user's edges by community, `[users, C]`."""
            edges = np.unique(trained.get(name, np.empty((0, 2), np.int64)), axis=0)
            place = edges[:, 0] * communities + community[edges[:, 1]]
            return np.bincount(place, minlength=len(users) * communities).reshape(-1, communities)

        self.first = count(truth.first_event)
        self.inside = np.zeros(self.first.shape)
        """The logarithm of how much more likely conversions are if a community is one of the user's."""
        for name, parent in parents_of({name: CONVERSION[name] for name in AFTER if name in trained}).items():
            if parent == truth.first_event:
                chance = CONVERSION[name]
                none = np.log((1 - chance) / (1 - OUTSIDE * chance))
                converted = count(name)
                self.inside += converted * np.log(1 / OUTSIDE) + np.maximum(self.first - converted, 0) * none
        self.near = np.zeros(self.first.shape)
        """The logarithm of how much more likely those near a user are if a community is its first one."""
        home = truth.user_communities[:, 0]
        closer = np.log1p(NEAR / (1 - NEAR) * len(home) / np.bincount(home, minlength=communities).clip(1))
        follows = trained.get("follows", np.empty((0, 2), np.int64))
        for one, other in (follows.T, follows.T[::-1]):
            np.add.at(self.near, (one, home[users[other]]), closer[home[users[other]]])

    def posterior(self, rows: Array) -> tuple[Array, Array]:
        """Return the probabilities that each community is a user's first, and its second, with each share.

        Args:
            rows: Of users, `[n]`.

        Returns:
            Twice float64 `[n, C, M]`; the sum over C and M is 1.
        """
        factor = (1 - self.truth.background) * self.communities / self.truth.background
        inside = self.inside[rows, :, None]
        first = self.first[rows, :, None] * np.log1p(factor * SHARES) + inside + self.near[rows, :, None]
        second = self.first[rows, :, None] * np.log1p(factor * (1 - SHARES)) + inside
        joint, other = first + _others(second), second + _others(first)
        return softmax(joint, (1, 2)), softmax(other, (1, 2))

    def scores(self, rows: Array, event: str) -> Array:
        """Return how likely each user's next event of a type is of each product, but for a factor; `[n, P]`."""
        first, second = self.posterior(rows)
        even = np.full((len(rows), self.communities), self.truth.background / self.communities)
        if event != self.truth.first_event:
            even *= OUTSIDE + (1 - OUTSIDE) * (first.sum(2) + second.sum(2))
        chance = even + (1 - self.truth.background) * (first @ SHARES + second @ (1 - SHARES))
        scores: Array = chance[:, self.community] * self.within
        return scores


def expected_recall(scores: Array, known: Array, relevant: Array, k: int) -> Array:
    """Return each query's Recall@k by the protocol of docs/reference/metrics.md, ties by expectation over their orders.

    Args:
        scores: float `[Q, N]`.
        known: int `[M, 2]`: query and candidate, of candidates that are no part of the list.
        relevant: int `[E, 2]`: query and candidate, each pair once; every query has one or more.
        k: Length of the list.

    Returns:
        float64 `[Q]`.
    """
    scores = scores.copy()
    scores[known[:, 0], known[:, 1]] = -np.inf
    hits, counts = np.zeros(len(scores)), np.bincount(relevant[:, 0], minlength=len(scores))
    part = max(1, CELLS // scores.shape[1])
    for start in range(0, len(relevant), part):
        query, candidate = relevant[start : start + part].T
        target = scores[query, candidate][:, None]
        above, tied = (scores[query] > target).sum(1), (scores[query] == target).sum(1)
        np.add.at(hits, query, np.clip((k - above) / tied, 0, 1))
    return hits / counts


def _of(edges: Array, heads: Array) -> Array:
    """Return the edges of sorted `heads`, these as positions among them."""
    place = np.searchsorted(heads, edges[:, 0]).clip(max=len(heads) - 1)
    here = heads[place] == edges[:, 0]
    return np.stack([place[here], edges[here, 1]], 1)


def _positions(store: Store, snapshot: str, entity: str, ids: Array) -> Array:
    """Return where each row of a vocabulary is among the sorted `ids` of a truth, int64 `[rows]`."""
    table = store.read(f"vocabulary/{entity}", snapshot)
    wanted = np.array(table["id"].to_pylist(), dtype=np.bytes_)
    order = np.argsort(ids)
    place = order[np.searchsorted(ids, wanted, sorter=order)]
    found = np.empty(len(place), np.int64)
    found[table["row"].to_numpy()] = place
    return found
