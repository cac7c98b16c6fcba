"""Every installed plugin keeps to the rules that `edgellm_sdk.kit.conformance` checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgellm_sdk import registry
from edgellm_sdk.kit.conformance import checks

CASES = [
    pytest.param(check, id=f"{row.name}-{check.__name__}")
    for row in registry.rows()
    if row.state != "broken"
    for check in checks(row.name)
]


@pytest.mark.parametrize("check", CASES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def test_no_plugin_of_this_repository_is_broken() -> None:
    assert [row for row in registry.rows() if row.state == "broken" and row.origin == "built-in"] == []
