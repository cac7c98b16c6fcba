"""Train with nothing but an inference engine: P-RGE inside an ExecuTorch program, as a phone would run it.

    pip install 'edgellm-sdk[executorch]'
    python cookbook/02_train_in_a_pte.py

Writes `runs/cookbook-02/train.pte`: SmolLM2 with eight perturbed copies of an adapter as its mutable state. Every
execution applies the last update, perturbs afresh and returns eight losses; the application only sends four numbers
back. Ends in a PEFT adapter folder and in answers of the model before and after.
"""

from __future__ import annotations

import time
from pathlib import Path

from edgellm_hardware.executorch.trainer import Trainer

import edgellm_sdk as edgellm
from edgellm_sdk import models
from edgellm_sdk.data import read
from edgellm_sdk.kit import loading, prompts
from edgellm_sdk.random import Stream

FOLDER = Path("runs/cookbook-02")
STEPS, BATCH, TOKENS = 60, 4, 80

edgellm.export(
    "executorch",
    model="smollm2-135m",
    output=FOLDER / "train.pte",
    options={"noise": "host", "queries": 4, "batch": BATCH, "tokens": TOKENS, "labels": 2 * BATCH, "layers": 2},
    quiet=False,
)
print(f"train.pte: {(FOLDER / 'train.pte').stat().st_size / 1e6:.0f} MB")

data = read("sms-spam")
order = Stream(0, "cookbook").permutation(len(data)).tolist()
half = {label: [i for i in order if data.examples[i].label == label] for label in data.labels}
chosen = [index for pair in zip(*half.values(), strict=False) for index in pair]
tokenizer = loading.load_tokenizer(models.resolve("smollm2-135m"))
rows = prompts.encode(tokenizer, data.select(chosen[: BATCH * (STEPS + 4)]).examples, TOKENS)
batches = [rows[k : k + BATCH] for k in range(0, len(rows), BATCH)]
train, held_out = batches[:STEPS], batches[STEPS:]

trainer = Trainer(FOLDER / "train.pte", learning_rate=0.02)
print(f"held-out loss before: {sum(map(trainer.evaluate, held_out)) / len(held_out):.3f}")
began = time.monotonic()
for number, batch in enumerate(train, 1):
    losses = trainer.step(batch)
    if number % 10 == 0:
        print(f"step {number}: mean loss of the candidates {losses.mean():.3f}, {time.monotonic() - began:.0f} s")
print(f"held-out loss after: {sum(map(trainer.evaluate, held_out)) / len(held_out):.3f}")

trainer.finalise(FOLDER / "adapter")
message = data.examples[chosen[BATCH * (STEPS + 4)]].prompt
print(message if isinstance(message, str) else message[-1]["content"])
for name in ("smollm2-135m", str(FOLDER / "adapter")):
    with edgellm.deploy(name) as session:
        print(f"{name} -> {session.generate(session.prompt_ids(message), max_tokens=8).text!r}")
