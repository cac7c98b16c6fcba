"""Hidden states kept on disk: the same bits, computed once, never another model's, and for their owner alone."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import edgellm_sdk as edgellm
from edgellm_sdk import models
from edgellm_sdk.errors import ConfigError, StorageError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.frozen import Frozen, Kept
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.random import Stream

TOP = ("down_proj",)
EXAMPLES: Sequence[Encoded] = [Encoded(tuple(range(1 + k, 12 + 2 * k)), 6 + k, k) for k in range(4)]


def frozen(model: Path, shelf: Path | None, targets: Sequence[str] = TOP, dtype: str = "float32") -> Frozen:
    spec = adapters.Spec("lora-fa", 1, 4, 8.0, tuple(targets))
    return Frozen(models.resolve(str(model)), spec, Stream(0, "a"), dtype, shelf=shelf)


def losses(live: Frozen, kept: Kept) -> list[float]:
    live.trainables.set_one(live.initial)
    return live._losses(kept, 1).tolist()


def no_model(*_: Any) -> Any:
    raise AssertionError("the model ran")


def test_a_second_process_reads_what_the_first_computed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = frozen(tiny_llama, None)
    wanted = losses(plain, plain.prepare(EXAMPLES))
    first = frozen(tiny_llama, tmp_path / "h")
    found = losses(first, first.prepare(EXAMPLES))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "h").iterdir()] == [0o600] * len(EXAMPLES)
    second = frozen(tiny_llama, tmp_path / "h")
    monkeypatch.setattr(second, "_record", no_model)
    assert losses(second, second.prepare(EXAMPLES)) == found
    assert len(second.prepare(EXAMPLES[1:3]).hidden) == 10, "whatever batch an example is in"
    with pytest.raises(AssertionError):
        second.prepare([Encoded(EXAMPLES[0].tokens, EXAMPLES[0].start + 1, 0)])


@pytest.mark.parametrize(
    "damage", [b"", b"\0" * 100, save({"hidden": torch.zeros(3, 3)}), save({"a": torch.zeros(1)}), None]
)
def test_what_cannot_be_read_is_computed_again(tiny_llama: Path, tmp_path: Path, damage: bytes | None) -> None:
    live = frozen(tiny_llama, tmp_path)
    wanted = losses(live, live.prepare(EXAMPLES))
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[:-7] if damage is None else damage)
    assert losses(live, live.prepare(EXAMPLES)) == wanted
    assert file.read_bytes() == whole


def test_another_model_precision_or_set_reads_nothing(make_tiny_llama: Any, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "h"
    made = [frozen(tiny_llama, folder), frozen(tiny_llama, folder, dtype="bfloat16")]
    made.append(frozen(make_tiny_llama(tmp_path / "other", seed=5), folder))
    for count, live in enumerate(made, 1):
        live.prepare(EXAMPLES)
        assert len(list(folder.iterdir())) == count * len(EXAMPLES)
    frozen(tiny_llama, folder, ("q_proj",)).prepare(EXAMPLES)  # it trains below what is kept
    assert len(list(folder.iterdir())) == len(made) * len(EXAMPLES)


def test_a_full_disk_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "h").write_text("a file")
    with pytest.raises(StorageError):
        frozen(tiny_llama, tmp_path / "h").prepare(EXAMPLES)


def test_runs_that_share_it_end_in_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("".join(f'{{"text": "a {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(16)))
    settings = {"layers": 1, "rank": 4, "batch_size": 4, "steps": 2, "precision": "float32"}
    ends = []
    for name in ("first", "second"):
        out = edgellm.finetune(
            "mezo", str(tiny_llama), str(data), tmp_path / name, rounds=2, options=settings, hidden=tmp_path / "h"
        )
        ends.append((out.folder / "model" / "adapter_model.safetensors").read_bytes())
        assert len(list((tmp_path / "h").iterdir())) == 16
    assert ends[0] == ends[1]
    below = edgellm.finetune(
        "mezo", str(tiny_llama), str(data), tmp_path / "below", rounds=1, hidden=tmp_path / "unused",
        options=settings | {"targets": "q_proj"},
    )  # fmt: skip
    assert [note for note in below.report.notes if "--hidden keeps nothing" in note]
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ConfigError, match="hidden"):
        edgellm.finetune("mezo", str(tiny_llama), str(data), out.folder, rounds=2, options=settings, resume=True)
