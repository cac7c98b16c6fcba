"""Who holds what: a data set dealt to simulated clients, disjoint and complete, a function of the stream alone.

iid               shuffled and dealt one by one
dirichlet:ALPHA   each label is spread over the clients by Dirichlet(ALPHA) shares; small ALPHA, unlike clients
                  (Hsu, Qi and Brown, 2019, arXiv:1909.06335)
skew:ALPHA        clients of one size, each with a mixture of labels from Dirichlet(ALPHA * the labels' shares)
                  (Zhang et al., 2022, arXiv:2212.10025)
label:K           each client holds shards of about K labels (McMahan et al., 2017, arXiv:1602.05629, section 3)
user              one client for each value of the `user` field
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgellm_sdk.errors import ConfigError, printable
from edgellm_sdk.random import Stream

if TYPE_CHECKING:
    from edgellm_sdk.types import Array, Dataset

SPECS = "iid, dirichlet:ALPHA, skew:ALPHA, label:K or user"
MAX_CLIENTS = 1_000_000


def partition(dataset: Dataset, spec: str, clients: int, stream: Stream) -> dict[str, list[int]]:
    """Client id -> ascending indices into `dataset`; every index once, no client empty.

    `clients` is ignored for `user`. ConfigError for an unknown spec, missing labels or users, or too many clients.
    """
    kind, _, argument = spec.partition(":")
    if kind == "user" and not argument:
        return _by_user(dataset)
    if not 1 <= clients <= min(MAX_CLIENTS, len(dataset)):
        fix = f"use 1..{len(dataset)}"
        raise ConfigError(f"{clients} clients cannot share {len(dataset)} examples", "clients", fix)
    if kind == "iid" and not argument:
        order = stream.permutation(len(dataset)).tolist()
        parts: list[list[int]] = [order[k::clients] for k in range(clients)]
    elif kind == "dirichlet":
        parts = _dirichlet(_groups(dataset, spec), _number(argument, spec), clients, stream)
    elif kind == "skew":
        parts = _skew(_groups(dataset, spec), _number(argument, spec), clients, stream)
    elif kind == "label":
        count = _number(argument, spec)
        if count != int(count):
            raise ConfigError(f"{printable(spec[:40])!r}: K is a whole number", "partition", f"use {SPECS}")
        parts = _by_label(_groups(dataset, spec), int(count), clients, stream)
    else:
        raise ConfigError(f"unknown partition {printable(spec[:40])!r}", "partition", f"use {SPECS}")
    _fill_empty(parts)
    width = max(3, len(str(clients - 1)))
    return {f"client-{k:0{width}d}": sorted(part) for k, part in enumerate(parts)}


def _number(text: str, spec: str) -> float:
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e9:  # false for NaN
        raise ConfigError(f"{printable(spec[:40])!r} needs a positive number", "partition", f"use {SPECS}")
    return value


def _groups(dataset: Dataset, spec: str) -> list[list[int]]:
    """Indices by label, labels ascending."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(dataset.examples):
        if example.label is None:
            raise ConfigError(f"{printable(spec[:40])!r} needs labelled data", "partition", "use iid or user")
        groups.setdefault(example.label, []).append(index)
    return [groups[label] for label in sorted(groups)]


def _by_user(dataset: Dataset) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {}
    for index, example in enumerate(dataset.examples):
        if example.user is None:
            raise ConfigError(f"example {index + 1} has no user", "partition", "add the field or use iid")
        parts.setdefault(example.user, []).append(index)
    named = {printable(user): parts[user] for user in sorted(parts)}
    if len(named) != len(parts):
        raise ConfigError("two users look the same once control characters are escaped", "partition")
    return named


def _dirichlet(groups: list[list[int]], alpha: float, clients: int, stream: Stream) -> list[list[int]]:
    import numpy as np

    parts: list[list[int]] = [[] for _ in range(clients)]
    for group in groups:
        shares = stream.gamma(alpha, clients)
        total = float(shares.sum())
        if not (np.isfinite(total) and total > 0):  # a tiny alpha underflows: its limit is one client for all
            shares = np.zeros(clients)
            shares[int(stream.bits(1)[0]) % clients] = total = 1.0
        cuts = np.rint(np.cumsum(shares / total) * len(group)).astype(int)
        cuts[-1] = len(group)
        order = [group[i] for i in stream.permutation(len(group)).tolist()]
        begin = 0
        for part, end in zip(parts, cuts.tolist(), strict=True):
            part += order[begin:end]
            begin = max(begin, end)
    return parts


def _skew(groups: list[list[int]], alpha: float, clients: int, stream: Stream) -> list[list[int]]:
    """Examples are dealt one by one, in an order that favours no client, each of a label drawn from its client's
    mixture. Labels that have run out leave the mixtures, which keep their proportions; a client with nothing left of
    its mixture draws from what there is."""
    import numpy as np

    left = np.array([len(group) for group in groups])
    total = int(left.sum())
    mixtures = np.array([_mixture(alpha * left / total, stream) for _ in range(clients)])
    queues = [[group[i] for i in stream.permutation(len(group)).tolist()] for group in groups]
    parts: list[list[int]] = [[] for _ in range(clients)]
    for place, u in zip(stream.permutation(total).tolist(), stream.uniform(total).tolist(), strict=True):
        client = place % clients
        weights = np.where(left > 0, mixtures[client], 0.0)
        if not weights.sum() > 0:
            weights = left.astype(np.float64)
        edges = np.cumsum(weights)
        label = int(np.searchsorted(edges, u * edges[-1], side="right"))
        label = min(label, int(np.flatnonzero(weights)[-1]))  # u * edges[-1] may round up to the end
        parts[client].append(queues[label].pop())
        left[label] -= 1
    return parts


def _mixture(alphas: Array, stream: Stream) -> Array:
    """Dirichlet(alphas): (labels,) float64, in proportion."""
    import numpy as np

    drawn = np.array([float(stream.gamma(float(alpha), 1)[0]) for alpha in alphas])
    if drawn.sum() > 0:
        return drawn
    edges = np.cumsum(alphas)  # all underflowed: the limit is one label, drawn by its share
    label = min(int(np.searchsorted(edges, stream.uniform(1)[0] * edges[-1], side="right")), len(alphas) - 1)
    return np.asarray(np.eye(len(alphas))[label])


def _by_label(groups: list[list[int]], count: int, clients: int, stream: Stream) -> list[list[int]]:
    """Each client owns `count` labels, labels going round in random order; a label is dealt evenly to its owners."""
    kinds = len(groups)
    if not math.ceil(kinds / clients) <= count <= kinds:
        fix = f"K is {math.ceil(kinds / clients)}..{kinds} for {clients} clients and {kinds} labels"
        raise ConfigError(f"label:{count} does not cover the labels", "partition", fix)
    labels, places = stream.permutation(kinds).tolist(), stream.permutation(clients).tolist()
    owners: list[list[int]] = [[] for _ in groups]
    for turn in range(clients * count):
        owners[labels[turn % kinds]].append(places[turn // count])
    parts: list[list[int]] = [[] for _ in range(clients)]
    for group, owning in zip(groups, owners, strict=True):
        order = [group[i] for i in stream.permutation(len(group)).tolist()]
        for k, owner in enumerate(owning):
            parts[owner] += order[k :: len(owning)]
    return parts


def _fill_empty(parts: list[list[int]]) -> None:
    """Give every empty client one example of the largest one; there are at least as many examples as clients."""
    import heapq

    empty = [k for k, part in enumerate(parts) if not part]
    heap = [(-len(part), k) for k, part in enumerate(parts) if part]
    heapq.heapify(heap)
    for k in empty:
        size, largest = heapq.heappop(heap)
        parts[k].append(parts[largest].pop())
        heapq.heappush(heap, (size + 1, largest))
        heapq.heappush(heap, (-1, k))
