"""Which examples a verb works on."""

from __future__ import annotations

from pathlib import Path

from edgellm_sdk import store
from edgellm_sdk.data import BUILT_IN, has_split, read, split
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset

VALIDATION_EXAMPLES = 100


def balanced(dataset: Dataset, seed: int) -> Dataset:
    """As many examples of every label as the rarest has, chosen at random, file order kept."""
    if not dataset.labels:
        raise ConfigError("--balance needs labelled data", dataset.name)
    groups = [[i for i, e in enumerate(dataset.examples) if e.label == label] for label in dataset.labels]
    present = [group for group in groups if group]
    stream = Stream(seed, "balance")
    size = min(len(group) for group in present)
    return dataset.select(sorted(i for group in present for i in stream.sample(group, size)))


def training_data(source: str, task_prompt: str, balance: bool, seed: int) -> tuple[Dataset, Dataset | None]:
    """(train, validation). A source without a validation split gives up a tenth of its examples if it has 20."""
    train = read(source, "train", task_prompt or None)
    valid: Dataset | None = None
    if has_split(source, "valid"):
        valid = read(source, "valid", task_prompt or None)
    elif len(train) >= 20:
        valid, train = split(train, 0.1, Stream(seed, "validation"))
    if balance:
        train = balanced(train, seed)
        valid = balanced(valid, seed) if valid is not None else None
    if valid is not None and len(valid) > VALIDATION_EXAMPLES:
        valid, _ = split(valid, VALIDATION_EXAMPLES / len(valid), Stream(seed, "validation", 1))
    return train, valid


def inherited_data(model: str, data: str, task_prompt: str) -> tuple[str, str]:
    """(data, task prompt) as given, else what the run folder `model` was made from, while that still exists."""
    recipe = Path(model) / "recipe.json"
    if data or not recipe.is_file():
        return data, task_prompt
    asked = store.read_json(recipe)
    source = str(asked.get("data", ""))
    if source != BUILT_IN and not (source and Path(source).exists()):
        return "", task_prompt
    return source, task_prompt or str(asked.get("task_prompt", ""))


def held_out(source: str, part: str, task_prompt: str, balance: bool, limit: int, seed: int) -> Dataset:
    """The examples to measure on, balanced and cut to about `limit` at random (seeded) when asked."""
    dataset = read(source, part, task_prompt or None)
    if balance:
        dataset = balanced(dataset, seed)
    if limit and limit < len(dataset):
        dataset, _ = split(dataset, limit / len(dataset), Stream(seed, "limit"))
    return dataset
