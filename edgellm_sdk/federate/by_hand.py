"""Aggregation of files carried by hand instead of messages: one round without a network."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from edgellm_sdk import store, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError, ModelError
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import FOLDED, Array, Arrays, State, Update

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT, SIDES = "base_model.model.", (".lora_A", ".lora_B")
FACTORS = tuple(f"{side}.weight" for side in SIDES)


def read_update(path: Path) -> Update:
    """A wire update, a plain safetensors file, or an adapter folder, as an update of round 1.

    A run folder stands for its `model`. Plain weights count as one example each and name their file as the client. A
    LoRA comes under the names of the model; that of a folder with its scale in B, so that B A is what it adds to W.
    """
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path
        if not (folder / WEIGHTS).is_file():
            raise ModelError(f"holds no {WEIGHTS}", str(path), "give adapter folders, run folders or updates")
        base = store.read_json(folder / "base.json")["digest"] if (folder / "base.json").is_file() else ""
        arrays = _scaled(folder) if _is_lora(folder) else store.load_arrays(folder / WEIGHTS)[0]
        return Update(base, 1, str(path), "weights", arrays, 1)
    arrays, fields = store.load_arrays(path)
    if fields.get("message") != "update":
        plain = {name.removesuffix(".weight") if name.endswith(FACTORS) else name: a for name, a in arrays.items()}
        return Update("", 1, str(path), "weights", plain, 1)
    update = wire.update_from_bytes(path.read_bytes(), str(path))
    return Update(update.base, 1, str(path), update.kind, update.arrays, update.examples, update.rng, update.scalars)


def _is_lora(folder: Path) -> bool:
    """Whether the folder holds products B A and nothing else."""
    if not (folder / CONFIG).is_file():
        return False
    told = store.read_json(folder / CONFIG)
    other = told.get("use_dora") or told.get("modules_to_save") or told.get("bias", "none") != "none"
    return str(told.get("peft_type")).upper() == "LORA" and not other


def _scaled(folder: Path) -> dict[str, Array]:
    from edgellm_sdk.kit import adapters

    found = dict(adapters.arrays(folder))
    for name in [name for name in found if name.endswith(".lora_B")]:
        found[name] = found[name] * found[name].dtype.type(adapters.lora_scale(folder, name.removesuffix(".lora_B")))
    return found


def _write_lora(target: Path, first: Path, arrays: Arrays) -> None:
    """`arrays` as a LoRA folder like `first`, at its scale, of as large a rank as it takes."""
    from edgellm_sdk.kit import adapters

    told = store.read_json(first / CONFIG)
    mark = store.read_json(first / adapters.MARK) if (first / adapters.MARK).is_file() else {}
    rows = [len(array) for name, array in arrays.items() if name.endswith(".lora_A")]
    scale, rank = float(told["lora_alpha"]) / float(told["r"]) or 1.0, max(rows, default=int(told["r"]))
    targets = mark.get("targets") or told.get("target_modules") or ()
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    spec = adapters.Spec(mark.get("kind", "lora"), int(mark.get("layers", 0)), rank, scale * rank, names)
    own = {
        name: array / array.dtype.type(scale) if name.endswith(".lora_B") else array for name, array in arrays.items()
    }
    known = (first / "base.json").is_file()
    base = store.read_json(first / "base.json") if known else {"path": str(told.get("base_model_name_or_path") or "")}
    adapters.write_arrays(target, spec, own, base)
    if not known:
        (target / "base.json").unlink()


def _write_file(target: Path, arrays: Arrays) -> None:
    """`arrays` as one file, a folded LoRA joined to what rests on it, PEFT's names completed again."""
    if any(name.endswith(FOLDED) for name in arrays):
        from edgellm_sdk.kit import adapters

        _, arrays = adapters.joined(adapters.Spec(rank=1, alpha=1.0), arrays)
    whole = {f"{n}.weight" if n.startswith(PEFT) and n.endswith(SIDES) else n: array for n, array in arrays.items()}
    store.save_arrays(target / WEIGHTS, whole, {})


def combine(relay: Relay, paths: Sequence[Path], output: Path, ctx: Context) -> dict[str, str]:
    """Aggregate the files at `paths` into `output / "model"`; returns why any was left out.

    Adapter folders give an adapter folder with the first one's configuration, but a LoRA's rank, which is as large as
    its product takes; anything else gives a safetensors file. LoRAs in files without a folder are taken to be of one
    scale.
    """
    if len(paths) < 2:
        raise FederationError("nothing to combine", fix="give at least two files")
    updates = sorted((read_update(path) for path in paths), key=lambda update: update.client)
    bases = {update.base for update in updates}
    if len(bases) != 1:
        raise FederationError("the files belong to different base models", ", ".join(u.client for u in updates))
    state = State(updates[0].base, 0, {}, {"scale": 1.0})
    reasons = {}
    for update in updates:
        if problem := wire.check_update(update, state, update.client):
            reasons[update.client] = problem
    usable = [update for update in updates if update.client not in reasons]
    reasons |= relay.screen(usable, state, ctx)
    usable = [update for update in usable if update.client not in reasons]
    if not usable:
        first = next(iter(reasons.items()))
        raise FederationError("no file could be used", f"{first[0]}: {first[1]}")
    combined = relay.aggregate(state, usable, ctx).sent
    target = output / "model"
    target.mkdir(parents=True, exist_ok=True)
    first_folder = paths[0] / "model" if (paths[0] / "model").is_dir() else paths[0]
    if first_folder.is_dir() and _is_lora(first_folder):
        _write_lora(target, first_folder, combined)
    elif first_folder.is_dir():
        for extra in (CONFIG, "edgellm_adapter.json", "base.json"):
            if (first_folder / extra).is_file():
                shutil.copyfile(first_folder / extra, target / extra)
        store.save_arrays(target / WEIGHTS, combined, {})
    else:
        _write_file(target, combined)
    store.publish(output, [f"model/{p.name}" for p in target.iterdir()], {"model": "model", "verb": "aggregate"})
    return reasons
