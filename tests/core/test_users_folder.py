"""The folder of one base and everyone's adapters: its manifest, and adapter files against their source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_sdk import gguf_file, ledger, models, registry, store, users
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import adapters
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Array, ModelHandle

SPEC = adapters.Spec("lora", 1, 2, 8.0, ("q_proj", "k_proj", "down_proj"))
SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.down_proj": (64, 128)}  # (d_out, d_in)


def factors(seed: int) -> dict[str, Array]:
    draw = np.random.default_rng(seed)
    found = {}
    for module, (d_out, d_in) in SHAPES.items():
        name = f"model.layers.1.{module}"
        found[f"{name}.lora_A"] = draw.normal(size=(2, d_in)).astype(np.float32)
        found[f"{name}.lora_B"] = draw.normal(size=(d_out, 2)).astype(np.float32)
    return found


def export(model: ModelHandle, target: Path, **options: Any) -> Path:
    loaded = registry.get("gguf", "export")
    relay = Relay([loaded], {"gguf": loaded.plugin.config(modelfile=False, **options)})
    return relay.export(model, target, Context(target.parent)).path


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, `ann` with an adapter of her own, `bob` on the federation's, `cy` on the base."""
    root = tmp_path_factory.mktemp("users")
    base = models.resolve(str(tiny_llama))
    export(base, root / "out" / "base.gguf")
    for seed, name in enumerate(("users/ann", "federation")):
        note = {"path": str(base.path), "digest": base.digest, "name": base.name}
        adapters.write_arrays(root / str(seed), SPEC, factors(seed), note)
        model = models.resolve(str(root / str(seed)))
        export(model, root / "out" / f"{name}.gguf", adapter="separate", type="f16")
    files = {"ann": "users/ann.gguf", "bob": "federation.gguf", "cy": ""}
    users.publish(root / "out", files, base.digest)
    return root / "out"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "out"))


def test_everyone_gets_the_file_that_was_written_for_them(folder: Path) -> None:
    for typed in (str(folder), str(folder / store.MANIFEST)):
        assert users.is_folder_of_users(typed)
        found = users.read(typed)
        assert found.checked_base() == folder / "base.gguf"
        assert found.checked_adapter("ann") == folder / "users" / "ann.gguf"
        assert found.checked_adapter("bob") == folder / "federation.gguf"
        assert found.checked_adapter("cy") is None
        assert [p.name for p in found.artifact().files] == ["base.gguf", "federation.gguf", "ann.gguf"]
        with pytest.raises(ConfigError, match="there is no user 'Ann', did you mean 'ann'"):
            found.checked_adapter("Ann")
    for other in (str(folder / "base.gguf"), str(folder / "users"), "nowhere", "x" * 5000, "\0", ""):
        assert not users.is_folder_of_users(other)


def test_digests_tell_tokenizer_template_and_weights_apart(copy: Path) -> None:
    found, base = users.read(str(copy)), copy / "base.gguf"
    whole = base.read_bytes()
    changes: tuple[tuple[Callable[[bytes], bytes], str], ...] = (
        (lambda raw: raw.replace(b"<|im_start|>assistant", b"<|im_start|>Assistant", 1), "its chat template differs"),
        (lambda raw: raw.replace(b"win", b"wim", 1), "its tokenizer differs"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "its content differs"),
    )
    for change, told in changes:
        base.write_bytes(change(whole))
        assert base.read_bytes() != whole
        with pytest.raises(ModelError, match=told):
            found.checked_base()
    base.write_bytes(whole)
    assert found.checked_base() == base
    (copy / "users" / "ann.gguf").write_bytes((copy / "federation.gguf").read_bytes())
    with pytest.raises(ModelError, match="is not the adapter that was exported"):
        found.checked_adapter("ann")
    (copy / "federation.gguf").unlink()
    with pytest.raises(ModelError, match="is missing"):
        found.checked_adapter("bob")


@pytest.mark.parametrize(
    "name", ["../x.gguf", "/etc/passwd", "users/../../x.gguf", "users/.x.gguf", "users/X.gguf", "base.gguf", 3, None]
)
def test_no_name_in_a_manifest_leads_out_of_its_folder(name: Any, copy: Path) -> None:
    manifest = json.loads((copy / store.MANIFEST).read_text())
    if name is None:
        del manifest["about"]["tokenizer"]
    else:
        manifest["about"]["users"]["ann"] = name
        manifest["files"][str(name)] = "0" * 64
    (copy / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="is no manifest of users' adapters"):
        users.read(str(copy))


@pytest.mark.parametrize(
    "rows", ["[]", "{}", '{"about": {"kind": "users"}}', '{"about": {"kind": "users"}, "files": 3}']
)
def test_other_manifests_are_refused(rows: str, copy: Path) -> None:
    (copy / store.MANIFEST).write_text(rows)
    if users.is_folder_of_users(str(copy)):
        with pytest.raises(ModelError, match="is no manifest"):
            users.read(str(copy))


def test_an_adapter_file_is_held_against_both_factors_of_its_source(folder: Path, tmp_path: Path) -> None:
    base = gguf_file.read(folder / "base.gguf")
    own, other = folder / "users" / "ann.gguf", folder / "federation.gguf"
    good = ledger.compare_adapter(folder.parent / "0", base, gguf_file.read(own))
    assert good.compared == 6 and not good.problems and good.ratio <= 1 and good.rounded == ("F16",)
    swapped = ledger.compare_adapter(folder.parent / "0", base, gguf_file.read(other))
    assert swapped.ratio > 100 and not swapped.problems

    source = models.resolve(str(folder.parent / "0"))
    for number, (side, change) in enumerate(
        (("lora_A", lambda a: a[::-1]), ("lora_B", lambda b: b * np.float32(1.01)), ("lora_B", lambda b: b[::-1]))
    ):
        arrays = factors(0)
        arrays[f"model.layers.1.self_attn.q_proj.{side}"] = change(arrays[f"model.layers.1.self_attn.q_proj.{side}"])
        note = store.read_json(folder.parent / "0" / "base.json")
        adapters.write_arrays(tmp_path / str(number), SPEC, arrays, note)
        report = ledger.compare_adapter(tmp_path / str(number), base, gguf_file.read(own))
        assert report.ratio > 1 and "blk.1.attn_q.weight.lora_" in report.worst
    doubled = replace(SPEC, alpha=16.0)  # the same factors at another scale
    adapters.write_arrays(tmp_path / "scale", doubled, factors(0), {"path": str(source.path), "digest": "", "name": ""})
    assert ledger.compare_adapter(tmp_path / "scale", base, gguf_file.read(own)).ratio > 1
    fewer = {name: array for name, array in factors(0).items() if "k_proj" not in name}
    adapters.write_arrays(tmp_path / "fewer", SPEC, fewer, {"path": str(source.path), "digest": "", "name": ""})
    assert len(ledger.compare_adapter(None, base, gguf_file.read(own)).problems) == 6
    report = ledger.compare_adapter(tmp_path / "fewer", base, gguf_file.read(own))
    assert sorted(report.problems) == [f"blk.1.attn_k.weight.lora_{side} has no source" for side in "ab"]
