"""The attacks of the privacy benchmark work where nothing protects, so that their failing elsewhere says something."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("dp_accounting")
pytest.importorskip("cryptography")
sys.path.insert(0, str(Path(__file__).parents[2] / "cookbook"))

from benchmarks import privacy  # noqa: E402


def test_the_area_by_hand() -> None:
    assert privacy.auc([3.0, 1.0], [2.0, 0.0]) == 0.75 and privacy.auc([1.0], [1.0]) == 0.5


def test_the_attacks_succeed_without_protection_and_noise_ends_the_span_check(tmp_path: Path) -> None:
    rows = {row["setting"]: row for row in privacy.study(tmp_path, trials=8, targets=24, shadows=6)}
    assert rows["none"]["span"] > 0.9 and rows["none"]["membership"] > 0.9
    assert rows["clip"]["span"] > 0.9, "a clip protects nothing by itself"
    assert abs(rows["dp, epsilon 2"]["span"] - 0.5) < 0.2
    assert rows["dp, epsilon 2"]["membership"] < rows["none"]["membership"]
