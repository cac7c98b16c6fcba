"""A row of the reliability bar: once in every run, all of its times in `make bar`."""

from __future__ import annotations

from typing import Any

import pytest


def times(row: str, count: int) -> list[Any]:
    first = pytest.param(0, marks=pytest.mark.row(row))
    return [first, *(pytest.param(k, marks=pytest.mark.bar(row)) for k in range(1, count))]
