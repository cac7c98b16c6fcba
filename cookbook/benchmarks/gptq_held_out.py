"""How far GPTQ's error on other text is from that on its calibration text, by damping and passes; a minute on one core.

    python cookbook/benchmarks/gptq_held_out.py

The third block of SmolLM2-135M, 192 rows of two of its matrices, iq4_nl. Calibrated on windows of 512 tokens of
Wikipedia text; the relative output error tr(D H D^T) / tr(W H W^T) is that on 8 windows of web text (C4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from archives import wheel
from edgellm_plugins.compression.gptq import Config
from edgellm_plugins.compression.gptq.method import Gptq, inverse_factor
from edgellm_plugins.compression.gptq.refit import row_errors
from gptq_perplexity import environment

from edgellm_sdk import store
from edgellm_sdk.kit import blocks
from edgellm_sdk.models import resolve

LAYER = "model.layers.2."
NAMES = ("self_attn.o_proj", "mlp.down_proj")
ROWS, LENGTH, FORMAT = 192, 512, "iq4_nl"


@torch.no_grad()
def hessians(loaded: Any, text: str, windows: int) -> dict[str, torch.Tensor]:
    """Mean over windows of 2 x x^T, for each of the matrices."""
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: windows * LENGTH]
    found: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        found[name] = found.get(name, 0) + 2 * flat.t() @ flat / windows

    handles = [
        loaded.model.get_submodule(LAYER + name).register_forward_pre_hook(
            lambda module, args, name=name: add(name, args[0])
        )
        for name in NAMES
    ]
    for batch in torch.tensor(ids).view(windows, LENGTH).split(4):
        loaded.model.model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def main() -> None:
    torch.set_num_threads(1)
    loaded = resolve("smollm2-135m").load()
    del loaded.model.model.layers[3:]
    loaded.model.config.num_hidden_layers = 3
    with wheel("exllamav2") as archive:
        folder = "exllamav2/conversion/standard_cal_data"
        wiki, web = (archive.read(f"{folder}/{name}.utf8").decode()[:120_000] for name in ("wiki", "c4"))
    other, rows, lattice = hessians(loaded, web, 8), [], blocks.lattice(FORMAT)
    for windows in (16, 40):
        seen = hessians(loaded, wiki, windows)
        for name in NAMES:
            weights = loaded.model.get_submodule(LAYER + name).weight.detach().t()[:, :ROWS].contiguous()
            size = row_errors(weights, other[name]).sum()
            for damping in (0.01, 0.1, 0.5):
                factor, damped = inverse_factor(seen[name], damping)
                for passes in (0, 4):
                    solver = Gptq(Config(format=FORMAT, passes=passes))
                    values = solver.quantise(weights, factor, damped, lattice).values(lattice)
                    error = float(row_errors(weights - values, other[name]).sum() / size)
                    rows.append(
                        {"windows": windows, "matrix": name, "damping": damping, "passes": passes, "error": error}
                    )
                    print(rows[-1], flush=True)
    result = {
        "command": "python cookbook/benchmarks/gptq_held_out.py", "format": FORMAT, "rows": rows,
        "environment": environment(),
    }  # fmt: skip
    store.write_json(Path("cookbook/benchmarks/results/gptq_held_out.json"), result)


if __name__ == "__main__":
    main()
