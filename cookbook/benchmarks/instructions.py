"""Short instruction pairs in categories, dealt to clients, and a model that has not learnt to answer them.

The category of a pair is decided by the first word of its instruction. One category is held out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from archives import alpaca

from edgellm_sdk import models
from edgellm_sdk.federate.partition import partition
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example

ANSWER_WORDS, PROMPT_WORDS = 24, 60
UNSEEN, UNSEEN_TEST, SEEN_TEST, VALID, LEAST = "rewrite", 56, 48, 32, 4
FIRST_WORDS = {
    "rewrite": "rewrite rewriting rearrange reword rephrase paraphrase edit change re transform convert correct "
    "proofread replace reorganize improve alter translate modify",
    "identify": "identify find detect determine select choose pick extract",
    "generate": "generate make produce",
    "create": "create write compose come craft design construct invent formulate",
    "classify": "classify categorize sort rank organize group order arrange divide",
    "name": "name list provide give suggest offer",
    "given": "given take from read you use using",
    "explain": "what which who how why describe explain summarize define compare calculate",
}
REST = "other"


def category(instruction: str) -> str:
    word = re.findall(r"[a-z]+", instruction.lower())[0]
    return next((name for name, words in FIRST_WORDS.items() if word in words.split()), REST)


def short_pairs() -> dict[str, list[dict[str, str]]]:
    """Pairs with a short prompt and answer by category, each shuffled by a fixed stream."""
    kept: dict[str, list[dict[str, str]]] = {name: [] for name in (*FIRST_WORDS, REST)}
    for row in alpaca():
        asked, answer = f"{row['instruction']} {row['input']}".split(), row["output"].split()
        if len(asked) <= PROMPT_WORDS and 1 <= len(answer) <= ANSWER_WORDS:
            kept[category(row["instruction"])].append(row)
    return {
        name: [rows[i] for i in Stream(0, f"alpaca {name}").permutation(len(rows)).tolist()]
        for name, rows in kept.items()
    }


def write_data(folder: Path, clients: int, seed: int) -> Path:
    """train (with the client as `user`), valid, test (seen categories) and unseen files. Only the dealing of the
    training pairs depends on `seed`."""
    pairs = short_pairs()
    seen = [{**row, "category": name} for name, rows in pairs.items() if name != UNSEEN for row in rows]
    seen = [seen[i] for i in Stream(0, "alpaca split").permutation(len(seen)).tolist()]
    parts = {
        "test": seen[:SEEN_TEST],
        "valid": seen[SEEN_TEST : SEEN_TEST + VALID],
        "unseen": pairs[UNSEEN][:UNSEEN_TEST],
    }
    train = seen[SEEN_TEST + VALID :]
    examples = tuple(Example(row["instruction"], row["output"], row["category"]) for row in train)
    labels = tuple(sorted({row["category"] for row in train}))
    for attempt in range(1000):
        dealt = partition(Dataset(examples, "", "", labels), "dirichlet:0.5", clients, Stream(seed, "deal", attempt))
        if min(len(rows) for rows in dealt.values()) >= LEAST:
            break
    else:
        raise ValueError(f"no dealing to {clients} clients gives each {LEAST} pairs")
    users = {i: client for client, rows in dealt.items() for i in rows}
    parts["train"] = [{**row, "user": users[i]} for i, row in enumerate(train)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def without_template(name: str, folder: Path) -> Path:
    """The model as a continuer of plain text: its files without the chat template.

    As a chat model it answers such prompts well before any training, which leaves little to tell values of K apart by.
    """
    source = models.resolve(name).path
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name not in ("chat_template.jinja", "MANIFEST.json"):
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
    return folder
