"""Partitions: disjoint, complete, no client empty, a function of the stream; and what each kind promises."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk.errors import ConfigError
from edgellm_sdk.federate.partition import partition
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example


def dataset(labels: list[str | None], users: list[str | None] | None = None) -> Dataset:
    users = users or [None] * len(labels)
    rows = zip(labels, users, strict=True)
    return Dataset(tuple(Example("", str(i), label, who) for i, (label, who) in enumerate(rows)), "f")


def check(parts: dict[str, list[int]], size: int) -> None:
    assert sorted(i for part in parts.values() for i in part) == list(range(size))
    assert all(part and part == sorted(part) for part in parts.values())


@settings(deadline=None, max_examples=150)
@given(
    labels=st.lists(st.sampled_from("abcd"), min_size=1, max_size=80),
    clients=st.integers(1, 12),
    spec=st.sampled_from(
        [
            "iid",
            "dirichlet:0.1",
            "dirichlet:1e-6",
            "dirichlet:1000",
            "label:1",
            "label:2",
            "label:4",
            "skew:0.1",
            "skew:1e-9",
            "skew:1000",
        ]
    ),
    seed=st.integers(0, 1000),
)
def test_properties(labels: list[str | None], clients: int, spec: str, seed: int) -> None:
    data = dataset(labels)
    try:
        parts = partition(data, spec, clients, Stream(seed, "partition"))
    except ConfigError:
        kinds = len(set(labels))
        count = int(spec[6:]) if spec.startswith("label") else 0
        assert clients > len(labels) or count > kinds or (count and count * clients < kinds)
        return
    assert list(parts) == [f"client-{k:03d}" for k in range(clients)]
    check(parts, len(labels))
    assert parts == partition(data, spec, clients, Stream(seed, "partition"))


def test_iid_is_even_and_shuffled() -> None:
    parts = partition(dataset(["a"] * 103), "iid", 10, Stream(0, "p"))
    assert sorted(map(len, parts.values())) == [10] * 7 + [11] * 3
    assert parts != partition(dataset(["a"] * 103), "iid", 10, Stream(1, "p"))


def test_label_gives_each_client_that_many_labels() -> None:
    labels: list[str | None] = [str(k % 6) for k in range(600)]
    for count in (1, 2, 5):
        parts = partition(dataset(labels), f"label:{count}", 12, Stream(0, "p"))
        assert all(len({labels[i] for i in part}) == count for part in parts.values())


def test_dirichlet_is_more_even_for_large_alpha() -> None:
    labels: list[str | None] = ["a", "b"] * 500

    def unlikeness(alpha: str) -> float:
        parts = partition(dataset(labels), f"dirichlet:{alpha}", 8, Stream(3, "p"))
        shares = [sum(labels[i] == "a" for i in part) / len(part) for part in parts.values()]
        return sum(abs(share - 0.5) for share in shares) / len(shares)

    assert unlikeness("1000") < 0.05 < 0.2 < unlikeness("0.1")


@pytest.mark.parametrize("alpha", ["1e-6", "0.1", "1", "1000"])
def test_skew_gives_all_clients_one_size(alpha: str) -> None:
    labels: list[str | None] = ["a"] * 400 + ["b"] * 250 + ["c"] * 70
    for clients in (10, 100, 7):
        parts = partition(dataset(labels), f"skew:{alpha}", clients, Stream(0, "p"))
        assert {len(part) for part in parts.values()} <= {720 // clients, 720 // clients + 1}
        check(parts, 720)


def test_skew_draws_mixtures_around_the_prior() -> None:
    """Of Dirichlet(alpha * prior) the mean is the prior p and the variance p (1 - p) / (alpha + 1). Small clients and
    much data, so that no label runs out and the shares of a client are its mixture and what sampling adds to it."""
    labels: list[str | None] = ["a"] * 3000 + ["b"] * 1000

    def shares(alpha: str) -> list[float]:
        found = []
        for seed in range(4):
            parts = partition(dataset(labels), f"skew:{alpha}", 100, Stream(seed, "p"))
            found += [sum(labels[i] == "a" for i in part) / 40 for part in parts.values()]
        return found

    for alpha in (1.0, 10.0):
        found = shares(str(alpha))
        mean = sum(found) / len(found)
        assert mean == pytest.approx(0.75, abs=1e-9)  # sizes are equal and every example is dealt once
        spread = sum((share - mean) ** 2 for share in found) / len(found)
        mixture = 0.75 * 0.25 / (alpha + 1)
        sampling = (0.75 * 0.25 - mixture) / 40
        assert spread == pytest.approx(mixture + sampling, rel=0.25)


def test_skew_of_a_tiny_alpha_is_one_label_a_client_while_it_lasts() -> None:
    labels: list[str | None] = ["a", "b"] * 500
    parts = partition(dataset(labels), "skew:1e-9", 20, Stream(5, "p"))
    pure = sum(len({labels[i] for i in part}) == 1 for part in parts.values())
    assert pure >= 8
    dirichlet = partition(dataset(labels), "dirichlet:0.1", 20, Stream(5, "p"))
    assert len({len(part) for part in dirichlet.values()}) > 5 > len({len(part) for part in parts.values()})


def test_user() -> None:
    parts = partition(dataset(["x"] * 4, ["zoë", "a", "zoë", "b"]), "user", 99, Stream(0, "p"))
    assert parts == {"a": [1], "b": [3], "zoë": [0, 2]}
    with pytest.raises(ConfigError, match="example 2 has no user"):
        partition(dataset(["x"] * 2, ["a", None]), "user", 1, Stream(0, "p"))


def test_many_clients_keep_their_order() -> None:
    parts = partition(dataset(["x"] * 1500), "iid", 1200, Stream(0, "p"))
    assert list(parts) == sorted(parts) and list(parts)[0] == "client-0000"


@pytest.mark.parametrize(
    "spec",
    ["", "iid:2", "user:1", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf",
     "dirichlet:1_0", "dirichlet:\u0663", "label:0", "label:1.5", "label:x", "label:9", "IID", "shards", "iid\x1b[2J",
     "skew", "skew:0", "skew:x"],
)  # fmt: skip
def test_wrong_specs(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        partition(dataset(["a", "b", "a", "b"]), spec, 2, Stream(0, "p"))
    assert str(caught.value).isprintable()


def test_wrong_counts_and_data() -> None:
    for clients in (0, -1, 5):
        with pytest.raises(ConfigError, match="cannot share"):
            partition(dataset(["a"] * 4), "iid", clients, Stream(0, "p"))
    for spec in ("label:1", "dirichlet:1", "skew:1"):
        with pytest.raises(ConfigError, match="labelled data"):
            partition(dataset([None] * 4), spec, 2, Stream(0, "p"))
