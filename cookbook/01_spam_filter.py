"""An on-device spam filter from private messages, step by step: what `edgellm demo` does, in Python.

    python cookbook/01_spam_filter.py

Ends in `runs/cookbook-01/filter.gguf`, which any llama.cpp runs, and a page to look at for each step.
"""

from __future__ import annotations

import edgellm_sdk as edgellm
from edgellm_sdk.data import read

FOLDER = "runs/cookbook-01"

tuned = edgellm.finetune(
    "fwdllm",
    model="smollm2-135m",
    data="sms-spam",
    output=f"{FOLDER}/tuned",
    clients=8,
    rounds=40,
    partition="dirichlet:5",
    balance=True,
    options={"layers": 1, "rank": 32, "alpha": 64.0, "optimizer": "adam", "learning_rate": 0.12, "batch_size": 16},
    quiet=False,
)
print(f"balanced accuracy on validation messages: {tuned.report.metrics['balanced accuracy'].value:.3f}")
print(f"each client sent {next(iter(tuned.report.bytes.values()))['up_payload']} bytes of scalars")

edgellm.compress("gptq", model=f"{FOLDER}/tuned", output=f"{FOLDER}/small", quiet=False)
exported = edgellm.export("gguf", model=f"{FOLDER}/small", output=f"{FOLDER}/filter.gguf", quiet=False)
print(f"gate: {'passed' if exported.report.verified['passed'] else 'failed'}")

held_out = read("sms-spam", "test")
with edgellm.deploy(f"{FOLDER}/filter.gguf") as session:
    for label in held_out.labels:
        for example in [row for row in held_out.examples if row.label == label][:3]:
            answer = session.generate(session.prompt_ids(example.prompt), max_tokens=4).text
            print(f"{example.prompt[0]['content'].splitlines()[0][:90]} -> {answer} (right: {example.completion})")
