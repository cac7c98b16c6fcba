"""What an update tells of the text it was trained on: gradient inversion (DLG, arXiv 1906.08935) and embedding rows.

    python cookbook/benchmarks/leakage.py --output cookbook/benchmarks/results/leakage.json

One gradient by theta of a causal language model that labels texts, for each way of tuning of `fedpetuning`, on real
messages of `--tokens` tokens. The attacker knows the model, theta and the shapes of the batch. It starts with random
embeddings and soft labels and moves both with Adam until their gradient points where the observed one does (1 - cos),
then reads each position as the nearest row of the embedding matrix. Told are precision, recall and F1 of the bag of
tokens.

`embedding rows` needs no search: where the embedding itself trains, its gradient is zero but in the rows of the tokens
that were read, so who sees it sees them; where it is frozen there is nothing to see. A tied output matrix hides that.

This measures one attack on one small random model. A low figure says that this attack failed, never that a method is
private: stronger ones exist (arXiv 2601.17533 reads adapters). Attention is eager and everything float32, because the
search takes derivatives of derivatives.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellm_sdk import store
from edgellm_sdk.data import SMS_PROMPT, read
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.kit.conformance_runs import tiny_model
from edgellm_sdk.models import resolve
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment

WAYS = {
    "full": Spec("full", 0),
    "adapter": Spec("houlsby", 0, size=5),
    "bitfit": Spec("bitfit", 0, norms=True),
    "prefix": Spec("prefix", 0, size=16),
    "lora": Spec("lora", 0, 1, 1.0),
}
"""Widths of about the paper's proportion to the hidden width: 64 and 8 of 768, here of 64."""


ANSWERS = (5, 6)
"""Two tokens that answer for the labels; a random model has no words for them."""


class Victim:
    """A model with a way of tuning in it. theta is where training would be after some steps: a LoRA at its start has
    no gradient by A at all."""

    def __init__(self, model: str, spec: Spec, seed: int) -> None:
        self.model = resolve(model).load(dtype="float32").model
        self.model.set_attn_implementation("eager")
        self.table: Tensor = self.model.get_input_embeddings().weight.detach()
        trainables = adapters.install(self.model, spec, Stream(seed, "adapter"))
        stream = Stream(seed, "theta")
        self.theta = {
            name: torch.from_numpy(value + 0.02 * stream.normal(value.size).reshape(value.shape))[None].requires_grad_()
            for name, value in sorted(trainables.initial.items())
        }
        trainables.set(self.theta)

    def gradient(self, embeddings: Tensor, labels: Tensor, search: bool = False) -> Tensor:
        """Of the mean cross-entropy of the answer after each text, by theta, in one row. embeddings (B, T, H), labels
        (B, 2) are the probabilities of the two `ANSWERS`."""
        logits = self.model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        loss = -(labels * F.log_softmax(logits, -1)[:, list(ANSWERS)]).sum(-1).mean()
        found = torch.autograd.grad(loss, list(self.theta.values()), create_graph=search)
        return torch.cat([part.flatten() for part in found])

    def observed(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The gradient on real text (B, T) and its labels (B,), 0 or 1."""
        return self.gradient(self.table[tokens], F.one_hot(labels, 2).float()).detach()

    def invert(self, observed: Tensor, rows: int, length: int, steps: int, seed: int) -> Tensor:
        """The tokens (B, T) that the search ends at."""
        draw = torch.Generator().manual_seed(seed)
        spread = float(self.table.std())
        guess = (spread * torch.randn(rows, length, self.table.shape[1], generator=draw)).requires_grad_()
        labels = torch.zeros(rows, 2).requires_grad_()
        rule = torch.optim.Adam([{"params": [guess], "lr": 0.1 * spread}, {"params": [labels], "lr": 0.1}])
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(rule, steps)
        for _ in range(steps):
            made = self.gradient(guess, labels.softmax(-1), search=True)
            apart = 1 - F.cosine_similarity(made, observed, dim=0)
            guess.grad, labels.grad = torch.autograd.grad(apart, [guess, labels])
            rule.step()
            falling.step()
        return torch.cdist(guess.detach(), self.table[None]).argmin(-1)


def embedding_rows(model: str, tokens: Tensor) -> set[int]:
    """Rows of the embedding's gradient that are not zero, when all of the model trains to answer texts (B, T)."""
    live = resolve(model).load(dtype="float32").model
    table = live.get_input_embeddings().weight.requires_grad_()
    logits = live(input_ids=tokens).logits[:, -1]
    F.cross_entropy(logits, torch.full((len(tokens),), ANSWERS[0])).backward()
    return set(table.grad.abs().sum(1).nonzero()[:, 0].tolist())


def bag(found: Sequence[int], truth: Sequence[int]) -> tuple[float, float, float]:
    """Precision, recall and F1 of one bag of tokens against another."""
    hits = sum((Counter(found) & Counter(truth)).values())
    precision, recall = hits / len(found), hits / len(truth)
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def messages(model: str, length: int) -> list[tuple[list[int], int]]:
    """Real messages cut to `length` tokens, and whether they are spam, in a fixed order."""
    tokenizer, data = resolve(model).load().tokenizer, read("sms-spam")
    before, after = SMS_PROMPT.split("{text}")
    rows = []
    for index in Stream(0, "leakage").permutation(len(data)).tolist()[:1000]:
        example = data.examples[index]
        text = str(example.prompt[0]["content"])  # type: ignore[index]
        ids = tokenizer.encode(text.removeprefix(before).removesuffix(after), add_special_tokens=False)
        if len(ids) >= length:
            rows.append((ids[:length], int(example.label == "spam")))
    return rows


def attacked(
    model: str, rows: Sequence[tuple[list[int], int]], batches: Sequence[int], samples: int, steps: int
) -> Any:
    told: dict[str, dict[str, Mapping[str, float]]] = {}
    for way, spec in WAYS.items():
        told[way] = {}
        for size in batches:
            scores = []
            for sample in range(samples):
                victim = Victim(model, spec, sample)
                mine = rows[sample * size : (sample + 1) * size]
                tokens = torch.tensor([ids for ids, _ in mine])
                observed = victim.observed(tokens, torch.tensor([label for _, label in mine]))
                found = victim.invert(observed, size, tokens.shape[1], steps, sample)
                scores.append(bag(found.flatten().tolist(), tokens.flatten().tolist()))
            names = ("precision", "recall", "f1")
            told[way][str(size)] = dict(zip(names, map(statistics.mean, zip(*scores, strict=True)), strict=True))
            print(way, size, told[way][str(size)], flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "leakage.json")
    asked = parser.parse_args()
    model = str(tiny_model().path) if asked.model == "tiny" else asked.model
    rows = messages(model, asked.tokens)
    truth = [set(rows[k][0]) for k in range(asked.samples)]
    seen = [embedding_rows(model, torch.tensor([rows[k][0]])) for k in range(asked.samples)]
    recall = statistics.mean(len(a & b) / len(b) for a, b in zip(seen, truth, strict=True))
    precision = statistics.mean(len(a & b) / len(a) for a, b in zip(seen, truth, strict=True))
    print("embedding rows", precision, recall, flush=True)
    told = {
        "command": "python cookbook/benchmarks/leakage.py", "environment": environment(),
        **{name: getattr(asked, name) for name in ("model", "samples", "steps", "tokens")},
        "embedding rows of full tuning": {"precision": precision, "recall": recall},
        "gradient inversion": attacked(model, rows, asked.batches, asked.samples, asked.steps),
    }  # fmt: skip
    store.write_json(asked.output, told)


if __name__ == "__main__":
    main()
