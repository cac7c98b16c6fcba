"""Aggregation of files carried by hand instead of messages: one round without a network."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from edgellm_sdk import store, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError, ModelError
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import State, Update

WEIGHTS = "adapter_model.safetensors"


def read_update(path: Path) -> Update:
    """A wire update, a plain safetensors file, or an adapter folder, as an update of round 1.

    A run folder stands for its `model`. Plain weights count as one example each and name their file as the client.
    """
    if path.is_dir():
        folder = path / "model" if (path / "model").is_dir() else path
        if not (folder / WEIGHTS).is_file():
            raise ModelError(f"holds no {WEIGHTS}", str(path), "give adapter folders, run folders or updates")
        base = store.read_json(folder / "base.json")["digest"] if (folder / "base.json").is_file() else ""
        arrays, _ = store.load_arrays(folder / WEIGHTS)
        return Update(base, 1, str(path), "weights", arrays, 1)
    arrays, fields = store.load_arrays(path)
    if fields.get("message") != "update":
        return Update("", 1, str(path), "weights", arrays, 1)
    update = wire.update_from_bytes(path.read_bytes(), str(path))
    return Update(update.base, 1, str(path), update.kind, update.arrays, update.examples, update.rng, update.scalars)


def combine(relay: Relay, paths: Sequence[Path], output: Path, ctx: Context) -> dict[str, str]:
    """Aggregate the files at `paths` into `output / "model"`; returns why any was left out.

    Adapter folders give an adapter folder with the first one's configuration, anything else a safetensors file.
    """
    if len(paths) < 2:
        raise FederationError("nothing to combine", fix="give at least two files")
    updates = sorted((read_update(path) for path in paths), key=lambda update: update.client)
    bases = {update.base for update in updates}
    if len(bases) != 1:
        raise FederationError("the files belong to different base models", ", ".join(u.client for u in updates))
    state = State(updates[0].base, 0, {})
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
    combined = relay.aggregate(state, usable, ctx)
    target = output / "model"
    target.mkdir(parents=True, exist_ok=True)
    first_folder = paths[0] / "model" if (paths[0] / "model").is_dir() else paths[0]
    if first_folder.is_dir():
        for extra in ("adapter_config.json", "edgellm_adapter.json", "base.json"):
            if (first_folder / extra).is_file():
                shutil.copyfile(first_folder / extra, target / extra)
    store.save_arrays(target / WEIGHTS, combined.arrays, {})
    store.publish(output, [f"model/{p.name}" for p in target.iterdir()], {"model": "model", "verb": "aggregate"})
    return reasons
