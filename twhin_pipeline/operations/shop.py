"""A synthetic shop: an event log and a table of who follows whom, as people have them, with the truth behind them.

Each user is interested in two communities of products, in shares of its own. A user's event of the first type (a view)
is of a product of its first community, of its second, or, with the probability `background`, of any community; within
a community products are drawn by popularity, which follows Zipf's law. Views lead to carts, carts to buys, and so on,
each with a probability of its own. `oracle_scores` gives the true probabilities, for benchmarks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import yaml

from twhin_pipeline.errors import UserError, unknown

Array = np.ndarray[Any, Any]
Format = Literal["csv", "parquet"]

AFTER: dict[str, str | None] = {
    "view": None,
    "cart": "view",
    "buy": "cart",
    "wishlist": "view",
    "share": "view",
    "review": "buy",
}
"""The event types there are, and the one that each follows."""
CONVERSION = {"view": 1.0, "cart": 0.12, "buy": 0.4, "wishlist": 0.05, "share": 0.02, "review": 0.15}
"""The default probability that an event of a type follows one of the type before it."""
OUTSIDE = 0.25
"""What the first conversion's probability is multiplied by for a product outside the user's two communities."""
SHARE_OF_FIRST = (5.0, 2.0)
"""The shares of users' first communities follow the Beta distribution of these."""
NEAR = 5 / 6
"""Of those whom a user follows, how many are drawn from its first community."""
UNKNOWN_EVENT = "impression"
"""The event type of dirty rows, which no configuration expects."""
DAY = 86_400


@dataclass(frozen=True)
class Shop:
    """What `generate_shop` wrote: rows of both files, and the path of the configuration."""

    events: int
    follows: int
    config: str


@dataclass(frozen=True)
class Truth:
    """What the log was drawn from, for U users and P products."""

    user_ids: Array
    """Bytes `[U]`."""
    product_ids: Array
    """Bytes `[P]`."""
    user_communities: Array
    """int32 `[U, 2]`; both are the same where there is one community."""
    mixture: Array
    """float64 `[U]`: the share of the first community among events that are not background."""
    product_community: Array
    """int32 `[P]`."""
    popularity: Array
    """float64 `[P]`: a product is drawn in proportion to it within its community."""
    background: float
    """The share of events whose community is drawn evenly from all."""
    first_event: str
    """The event type that follows none."""


def generate_shop(
    folder: str,
    *,
    users: int = 3_000,
    products: int = 2_000,
    communities: int = 20,
    days: int = 30,
    events_per_user: float = 40.0,
    sigma: float = 0.8,
    exponent: float = 1.0,
    background: float = 0.15,
    events: Mapping[str, float | None] | None = None,
    follows_per_user: float = 6.0,
    dirty: float = 0.007,
    start: str = "2025-01-01",
    format: Format = "csv",
    truth: bool = True,
    seed: int = 0,
) -> Shop:
    """Write `events.csv`, `follows.csv`, `truth.npz` and the configuration `twhin.yaml` to `folder`.

    The files are the same for the same arguments. Events are in order of time, with the columns `event_time` (UTC),
    `event_type`, `user_id`, `product_id` and `price` (missing in a tenth of the rows); the columns of follows are
    `follower` and `followee`.

    Args:
        folder: A local folder; it is made where it is missing, and files of these names are replaced.
        users: The number of users.
        products: The number of products.
        communities: The number of communities, from 1 to 300.
        days: Events happen within so many days. A user's first day is among the first two thirds of them.
        events_per_user: The mean number of events of a user, all types together.
        sigma: The number of a user's events is lognormal: the standard deviation of its logarithm.
        exponent: The product of rank r has the popularity r^-exponent: 0 is flat, above 1 steep.
        background: The share of first events whose community is drawn evenly from all.
        events: Event types and the probability with which each follows an event of the type before it (`AFTER`; where
            that is not among them, the one before that); None takes the default of `CONVERSION`. The first type
            follows none, and its probability is not used. Left out: view, cart and buy.
        follows_per_user: The mean number of users that a user follows, five sixths of them of its first community; 0
            writes no `follows`.
        dirty: The share of events without a user (three sevenths of them), without a product, or of an unknown type.
        start: The first day, YYYY-MM-DD.
        format: `csv` or `parquet`.
        truth: Write `truth.npz`, which `load_truth` reads.
        seed: The seed of everything random.

    Raises:
        UserError: An argument is out of its range.
    """
    types = _event_types(events)
    _check(
        folder, users=users, products=products, communities=communities, days=days, events_per_user=events_per_user,
        sigma=sigma, exponent=exponent, background=background, follows_per_user=follows_per_user, dirty=dirty,
        start=start, format=format, seed=seed,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    known = _draw_truth(rng, users, products, communities, exponent, background, next(iter(types)))
    prices = rng.gamma(2.0, 20.0, products).round(2)
    columns = _draw_events(rng, known, types, days, events_per_user, sigma)
    log = _log(rng, known, types, columns, prices, dirty, date.fromisoformat(start))
    pairs = _draw_follows(rng, known, follows_per_user)
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write(log, f"{folder}/events.{format}")
    if follows_per_user:
        ids = pa.array(known.user_ids.astype(str))
        _write(pa.table({"follower": ids.take(pairs[0]), "followee": ids.take(pairs[1])}), f"{folder}/follows.{format}")
    if truth:
        np.savez_compressed(f"{folder}/truth.npz", **vars(known))
    config = f"{folder}/twhin.yaml"
    Path(config).write_text(_config(format, list(types), bool(follows_per_user)), encoding="utf-8")
    return Shop(len(log), len(pairs[0]), config)


def load_truth(path: str) -> Truth:
    """Read the `truth.npz` of a generated shop."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return Truth(**{**arrays, "background": float(arrays["background"]), "first_event": str(arrays["first_event"])})


def oracle_scores(truth: Truth, users: Array, event: str | None = None) -> Array:
    """Return the true probability that a user's next event is of each product.

    Args:
        truth: What the log was drawn from.
        users: Positions of users in `truth.user_ids`, `[n]`.
        event: The event's type. The first type, which is the default, is as the log draws it; later types happen less
            often outside the user's two communities, all of them equally.

    Returns:
        float64 `[n, P]`; each row adds up to 1.
    """
    pairs = truth.user_communities[users]
    within = truth.popularity / np.bincount(truth.product_community, truth.popularity)[truth.product_community]
    communities = int(truth.product_community.max()) + 1
    chance = np.full((len(pairs), communities), truth.background / communities)
    rows = np.arange(len(pairs))
    mixture = truth.mixture[users]
    chance[rows, pairs[:, 0]] += (1 - truth.background) * mixture
    chance[rows, pairs[:, 1]] += (1 - truth.background) * (1 - mixture)
    if event not in (None, truth.first_event):
        factor = np.full_like(chance, OUTSIDE)
        factor[rows[:, None], pairs] = 1
        chance *= factor
        chance /= chance.sum(1, keepdims=True)
    scores: Array = chance[:, truth.product_community] * within
    return scores


def _event_types(events: Mapping[str, float | None] | None) -> dict[str, float]:
    """Return the probability of each type, in order of `AFTER`'s chain; the first one's is 1."""
    wanted = dict.fromkeys(("view", "cart", "buy")) if events is None else dict(events)
    if not wanted:
        raise UserError("generate: give at least one event type, such as view")
    for name in wanted:
        if name not in AFTER:
            raise UserError(f"generate: {unknown('event type', name, AFTER)}")
    types: dict[str, float] = {}
    for name in AFTER:
        if name in wanted:
            chance = wanted[name]
            chance = CONVERSION[name] if chance is None else chance
            if not 0 < chance <= 1:
                raise UserError(f"generate: the probability of {name} must be above 0 and at most 1, got {chance}")
            types[name] = chance if types else 1.0
    return types


def parents_of(types: Mapping[str, float]) -> dict[str, str]:
    """Return the type that each follows, for all but the first: the nearest that is there, else the first."""
    first, *others = types
    parents = {}
    for name in others:
        parent = AFTER[name]
        while parent is not None and parent not in types:
            parent = AFTER[parent]
        parents[name] = parent or first
    return parents


def _draw_truth(
    rng: np.random.Generator,
    users: int,
    products: int,
    communities: int,
    exponent: float,
    background: float,
    first: str,
) -> Truth:
    one = rng.integers(0, communities, users)
    other = (one + rng.integers(1, communities, users)) % communities if communities > 1 else one
    # Every community has a product.
    of_product = np.concatenate([np.arange(communities), rng.integers(0, communities, products - communities)])
    return Truth(
        user_ids=_ids("u_", users, 6),
        product_ids=_ids("SKU-", products, 5),
        user_communities=np.stack([one, other], 1).astype(np.int32),
        mixture=rng.beta(*SHARE_OF_FIRST, users),
        product_community=rng.permutation(of_product).astype(np.int32),
        popularity=(rng.permutation(products) + 1.0) ** -exponent,
        background=background,
        first_event=first,
    )


def _ids(prefix: str, count: int, width: int) -> Array:
    width = max(width, len(str(count - 1)))
    return np.array([f"{prefix}{number:0{width}d}" for number in range(count)], np.bytes_)


def _draw_events(
    rng: np.random.Generator, truth: Truth, types: Mapping[str, float], days: int, events_per_user: float, sigma: float
) -> tuple[Array, Array, Array, Array]:
    """Return each event's time (seconds since the start), type (a number), user and product, in order of time."""
    parents = parents_of(types)
    communities = int(truth.product_community.max()) + 1
    own = 1 - truth.background * max(0, communities - 2) / communities
    expected = {next(iter(types)): 1.0}  # events of a type for each first event
    for name, parent in parents.items():
        expected[name] = expected[parent] * types[name]
        if parent == truth.first_event:
            expected[name] *= own + (1 - own) * OUTSIDE
    mean = events_per_user / sum(expected.values())
    users = len(truth.user_ids)
    # The mean of a lognormal variable is exp(mu + sigma^2 / 2).
    activity = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, users)
    number = np.maximum(1, np.floor(activity + rng.random(users))).astype(np.int64)
    user = np.repeat(np.arange(users), number)
    community = _draw_communities(rng, truth, user, communities)
    product = _draw_products(rng, truth, community, communities)
    inside = (community[:, None] == truth.user_communities[user]).any(1)
    first_day = rng.integers(0, max(1, 2 * days // 3), users)[user]
    day = first_day + np.floor(rng.random(len(user)) * (days - first_day)).astype(np.int64)
    time = day * DAY + rng.integers(0, DAY, len(user))
    drawn = {truth.first_event: (np.arange(len(user)), time)}
    for name, parent in parents.items():
        at, times = drawn[parent]
        chance = types[name] * (np.where(inside[at], 1, OUTSIDE) if parent == truth.first_event else 1)
        happens = np.flatnonzero(rng.random(len(at)) < chance)
        later = times[happens] + rng.integers(20, 600, len(happens))
        drawn[name] = at[happens], np.minimum(later, days * DAY - 1)
    times = np.concatenate([times for _, times in drawn.values()])
    kinds = np.repeat(np.arange(len(drawn)), [len(at) for at, _ in drawn.values()])
    at = np.concatenate([at for at, _ in drawn.values()])
    order = np.argsort(times, kind="stable")
    at = at[order]
    return times[order], kinds[order], user[at], product[at]


def _draw_communities(rng: np.random.Generator, truth: Truth, user: Array, communities: int) -> Array:
    unit = rng.random(len(user))
    taste = 1 - truth.background
    pairs = truth.user_communities[user]
    chosen = np.where(unit < taste * truth.mixture[user], pairs[:, 0], pairs[:, 1])
    return np.where(unit < taste, chosen, rng.integers(0, communities, len(user)))


def _draw_products(rng: np.random.Generator, truth: Truth, community: Array, communities: int) -> Array:
    """Draw a product of each community, in proportion to popularity: by where a number falls among the sums."""
    order = np.argsort(truth.product_community, kind="stable")
    sums = np.cumsum(truth.popularity[order])
    ends = np.cumsum(np.bincount(truth.product_community, minlength=communities))
    starts = ends - np.bincount(truth.product_community, minlength=communities)
    low = np.where(starts > 0, sums[starts - 1], 0)
    aim = low[community] + rng.random(len(community)) * (sums[ends - 1] - low)[community]
    place = np.searchsorted(sums, aim, side="right")
    return order[np.clip(place, starts[community], ends[community] - 1)]


def _log(
    rng: np.random.Generator,
    truth: Truth,
    types: Mapping[str, float],
    columns: tuple[Array, Array, Array, Array],
    prices: Array,
    dirty: float,
    start: date,
) -> pa.Table:
    """Return the events as a table, some of them dirty."""
    time, kind, user, product = columns
    begin = (start - date(1970, 1, 1)).days * DAY
    fate = rng.random(len(time)) / dirty if dirty else np.ones(len(time))
    kind = np.where((fate >= 5 / 7) & (fate < 1), len(types), kind)
    names = pa.array([*types, UNKNOWN_EVENT])
    user_ids, product_ids = (pa.array(ids.astype(str)) for ids in (truth.user_ids, truth.product_ids))
    return pa.table(
        {
            "event_time": pa.array(time + begin).cast(pa.timestamp("s")),
            "event_type": names.take(pa.array(kind)),
            "user_id": user_ids.take(pa.array(user, mask=fate < 3 / 7)),
            "product_id": product_ids.take(pa.array(product, mask=(fate >= 3 / 7) & (fate < 5 / 7))),
            "price": pa.array(prices[product], mask=rng.random(len(time)) < 0.1),
        }
    )


def _draw_follows(rng: np.random.Generator, truth: Truth, follows_per_user: float) -> tuple[Array, Array]:
    """Return who follows whom, each pair once, in order."""
    users = len(truth.user_ids)
    follower = np.repeat(np.arange(users), rng.poisson(follows_per_user, users))
    home = truth.user_communities[:, 0]
    order = np.argsort(home, kind="stable")
    sizes = np.bincount(home)
    starts = np.cumsum(sizes) - sizes
    community = home[follower]
    near = order[starts[community] + np.floor(rng.random(len(follower)) * sizes[community]).astype(np.int64)]
    followee = np.where(rng.random(len(follower)) < NEAR, near, rng.integers(0, users, len(follower)))
    pairs = np.unique((follower * users + followee)[follower != followee])
    return pairs // users, pairs % users


def _write(table: pa.Table, path: str) -> None:
    draft = f"{path}.part"
    if path.endswith(".parquet"):
        pq.write_table(table, draft, compression="zstd")
    else:
        with open(draft, "wb") as file:
            file.write((",".join(table.column_names) + "\n").encode())
            # No value needs quotes, and an ordinary log has none.
            csv.write_csv(table, file, csv.WriteOptions(include_header=False, quoting_style="none"))
    os.replace(draft, path)


def _config(format: Format, relations: list[str], follows: bool) -> str:
    """Return the YAML of a configuration that trains on the files beside it."""
    columns = {"lhs": "user_id", "rel": "event_type", "rhs": "product_id", "time": "event_time"}
    sources: list[dict[str, Any]] = [{"path": f"events.{format}", "columns": columns}]
    listed = [{"name": name, "lhs": "user", "rhs": "product"} for name in relations]
    split: dict[str, Any] = {"strategy": "temporal", "validation": 0.05, "test": 0.1}
    if follows:
        columns = {"lhs": "follower", "rhs": "followee"}
        sources.append({"path": f"follows.{format}", "relation": "follows", "columns": columns})
        listed.append({"name": "follows", "lhs": "user", "rhs": "user"})
        split["relations"] = relations
    data = {
        "sources": sources,
        "model": {"embeddings": {"tables": [{"name": "user"}, {"name": "product"}]}, "relations": listed},
        "split": split,
    }
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
    return f"# A generated shop: `twhin run --config` this file trains on it.\n{text}"


def _check(folder: str, **values: Any) -> None:
    wrong = None
    if "://" in folder or Path(folder).is_file():
        wrong = f"{folder!r} must be a local folder"
    for name, low, high in (
        ("users", 2, 100_000_000),
        ("products", 2, 100_000_000),
        ("communities", 1, 300),
        ("days", 1, 100_000),
        ("events_per_user", 1, 1_000_000),
        ("sigma", 0, 3),
        ("exponent", 0, 10),
        ("background", 0, 1),
        ("follows_per_user", 0, 10_000),
        ("dirty", 0, 1),
        ("seed", 0, 2**63),
    ):
        if not low <= values[name] <= high:
            wrong = wrong or f"{name} must be between {low} and {high}, got {values[name]}"
    if values["communities"] > values["products"]:
        wrong = wrong or f"communities ({values['communities']}) must be at most products ({values['products']})"
    if values["format"] not in ("csv", "parquet"):
        wrong = wrong or f"format must be csv or parquet, got {values['format']!r}"
    try:
        date.fromisoformat(values["start"])
    except ValueError:
        wrong = wrong or f"start must be a date, YYYY-MM-DD, got {values['start']!r}"
    if wrong:
        raise UserError(f"generate: {wrong}")
