"""Back-propagation for small trainable sets, in little more memory than inference, and the rounds built on it.

One step holds one decoder layer's activations at a time. Layers below the lowest trained one run without autograd and
their output may be kept (`edgellm_sdk.kit.frozen`). Of every layer above only the input is stored; each is run again
when the gradient reaches it, and its graph is freed before the next (arXiv 1604.06174, one segment a layer). The top
layer runs once, with its FFN at the scored positions only. The loss goes over the vocabulary in chunks of positions,
each leaving its gradient behind, so N x vocabulary logits never exist (arXiv 2411.09009 has the idea, we the loop).

The base stays frozen in its own precision; adapters, their gradients and the optimiser are float32.

Rounds: a client takes `steps` steps from the theta it was sent and sends kind `delta`, theta_new - theta_old float32;
the server adds the example-weighted mean (FedAvg, arXiv 1602.05629). The optimiser's moments start at zero in every
round and stay on the client: they are neither sent nor kept. `forwards` counts a step of forward and backward as 3
forwards, the usual 1:2 cost, and leaves recomputation out, so that methods compare by arithmetic they ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from edgellm_plugins.aggregation.fedavg import Config
from edgellm_plugins.aggregation.fedavg import method as fedavg
from edgellm_plugins.training.options import Options
from edgellm_sdk.companions import is_torch
from edgellm_sdk.context import Context, Drift
from edgellm_sdk.errors import ConfigError, DataError, FederationError
from edgellm_sdk.kit import adapters, averaging
from edgellm_sdk.kit.frozen import Frozen, Kept
from edgellm_sdk.kit.objective import Objective, measured, objective, written
from edgellm_sdk.types import FOLDED, FROZEN, Array, Arrays, Assignment, Dataset, Metric, ModelHandle, State, Update

FORWARDS = 3  # one forward and one backward, in forwards
Leaves: TypeAlias = dict[str, Tensor]
"""theta as autograd leaves, each (1, *shape) float32: what `Trainables.set` takes for one probe."""
Slope: TypeAlias = Callable[[int, str, Callable[[], Dataset], Leaves], float]
"""(step number, name of a batch, its examples, leaves) -> loss there; sets every leaf's `.grad`."""
Loss: TypeAlias = Callable[[Tensor], tuple[float, Tensor]]
"""Normed hidden states at the scored positions (N, H) -> a loss there and its gradient by them, in their dtype."""
Batch: TypeAlias = Callable[[int, str, Callable[[], Dataset]], tuple[Kept, Loss]]
"""(step number, name of a batch, its examples) -> what is run and what is minimised on it, at the theta installed."""


def frozen_base(
    model: ModelHandle, spec: adapters.Spec, ctx: Context, precision: str, hidden_memory: int, max_length: int
) -> Frozen:
    """The frozen base with `spec`'s tensors in it, made once per process. ConfigError on a device without autograd."""
    if not is_torch(ctx.device):
        raise ConfigError(f"{ctx.device} cannot back-propagate", "device", "use cpu or cuda")
    frozen: Any = objective(model, spec, ctx, precision, hidden_memory, max_length)
    if frozen.trainables.lowest == 0:
        frozen.budget = 0  # there is nothing below but the embedding, which costs less to look up than to keep
    return frozen


# One gradient


def leaves_of(arrays: Arrays, device: torch.device | str = "cpu") -> Leaves:
    """Copies of `arrays` that collect gradients."""
    return {
        name: torch.from_numpy(np.array(arrays[name], dtype=np.float32))[None].to(device).requires_grad_()
        for name in sorted(arrays)
    }


def chunked_cross_entropy(normed: Tensor, targets: Tensor, head: nn.Module, chunk: int) -> tuple[float, Tensor]:
    """Mean cross-entropy of `head(normed)` against `targets`, and its gradient by `normed`.

    normed (N, H), targets (N,) long; the gradient is (N, H) in normed's dtype. d loss / d logits = (softmax - onehot)
    / N is formed in place, float32, for `chunk` positions at a time: 8 bytes x chunk x vocabulary at most with a 16-bit
    head, 4 with a float32 one. The head is frozen.
    """
    weight: Any = head.weight
    gradient, total = torch.empty_like(normed), 0.0
    with torch.no_grad():
        for start in range(0, len(targets), chunk):
            wanted = targets[start : start + chunk, None]
            z = head(normed[start : start + chunk]).float()
            top = z.amax(1, keepdim=True)
            right = z.gather(1, wanted) - top
            mass = z.sub_(top).exp_().sum(1, keepdim=True)
            total += float((mass.log() - right).double().sum())
            z.div_(mass).scatter_add_(1, wanted, torch.full_like(right, -1))
            gradient[start : start + chunk] = z.to(weight.dtype) @ weight
    return total / len(targets), gradient.div_(len(targets))


def backward(frozen: Frozen, kept: Kept, chunk: int, criterion: Loss | None = None) -> float:
    """Mean cross-entropy per scored token of `kept` with the trainables now installed: nats; or any other `criterion`.

    Its gradient is added to `.grad` of those that are leaves. Equal to autograd through the whole model up to rounding.
    Nothing is kept of layers below the lowest with a leaf in it.
    """
    lower = [] if frozen.rows_only else list(zip(frozen.tail[:-1], kept.calls, strict=False))
    still = min(frozen.trainables.untrained(), len(lower))
    inputs = [kept.hidden.clone()]  # inference tensors cannot be saved for backward, clones can
    with torch.no_grad():
        for layer, keywords in lower[:still]:
            inputs = [_output(layer, inputs[0], keywords)]
        lower = lower[still:]
        for layer, keywords in lower:
            inputs.append(_output(layer, inputs[-1], keywords))
    hidden = inputs.pop().requires_grad_(bool(inputs))
    normed = frozen.model.model.norm(_scored(frozen, kept, hidden))
    if criterion is None:
        loss, gradient = chunked_cross_entropy(normed.detach(), kept.targets, frozen.model.lm_head, chunk)
    else:
        loss, gradient = criterion(normed.detach())
    torch.autograd.backward(normed, gradient)
    del normed, gradient
    for layer, keywords in reversed(lower):
        above = hidden.grad
        hidden = inputs.pop().requires_grad_(bool(inputs))
        torch.autograd.backward(_output(layer, hidden, keywords), above)
    return loss


def _output(layer: nn.Module, hidden: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    out = layer(hidden, **_usable(keywords))
    return out[0] if isinstance(out, tuple) else out


def _usable(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded keywords with clones for tensors, as for hidden states."""

    def copied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(copied(item) for item in value)
        return value.clone() if torch.is_tensor(value) else value

    return {name: copied(value) for name, value in keywords.items()}


def _scored(frozen: Frozen, kept: Kept, hidden: Tensor) -> Tensor:
    """What leaves the top layer at the scored positions, (N, H), from what enters it."""
    top: Any = frozen.tail[-1]
    if not frozen.splits:
        return _output(top, hidden, kept.calls[-1])[kept.rows, kept.columns]
    if not frozen.rows_only:
        mixed = top.self_attn(hidden_states=top.input_layernorm(hidden), **_usable(kept.calls[-1]))
        hidden = (hidden + mixed[0])[kept.rows, kept.columns]
    return hidden + top.mlp(top.post_attention_layernorm(hidden))


def folded(arrays: Arrays) -> dict[str, Tensor]:
    """What an assignment's theta rests on, for `Trainables.set`: frozen arrays and folded LoRAs."""
    return {
        name.removeprefix(FROZEN): torch.from_numpy(np.array(array, np.float32))[None]
        for name, array in arrays.items()
        if name.startswith(FROZEN) or name.endswith(FOLDED)
    }


def exact_slope(
    frozen: Frozen, chunk: int, beneath: Mapping[str, Tensor] | None = None, batch: Batch | None = None
) -> Slope:
    """The `Slope` of back-propagation; `beneath` is what `folded` gives, `batch` another loss than cross-entropy."""

    def slope(step: int, name: str, make: Callable[[], Dataset], leaves: Leaves) -> float:
        for leaf in leaves.values():  # before any activation: gradients made between them would pin the heap
            leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.zero_()
        frozen.trainables.set({**leaves, **(beneath or {})})
        if batch is None:
            return backward(frozen, frozen.batch(name, make), chunk)
        with torch.no_grad():
            kept, criterion = batch(step, name, make)
        return backward(frozen, kept, chunk, criterion)

    return slope


# One step


class StepRule:
    """AdamW (betas 0.9 and 0.999, decay first, as torch.optim.AdamW) or SGD with the same decoupled decay, which spares
    biases and norm gains.

    Works in place on leaves, with two float32 moments a scalar for AdamW and none for SGD.
    """

    def __init__(self, leaves: Leaves, kind: str, decay: float = 0.0, eps: float = 1e-8) -> None:
        self.leaves, self.kind, self.decay, self.eps, self.taken = leaves, kind, decay, eps, 0
        self.rates: list[float] = []
        self.moments = {
            name: (torch.zeros_like(leaf), torch.zeros_like(leaf)) for name, leaf in leaves.items() if kind == "adamw"
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.taken += 1
        self.rates.append(rate)
        for name, leaf in self.leaves.items():
            gradient = leaf.grad
            if gradient is None:
                raise RuntimeError(f"{name} got no gradient")
            if not name.lower().endswith(("bias", "norm.weight")):
                leaf.mul_(1 - rate * self.decay)
            if self.kind == "sgd":
                leaf.sub_(gradient, alpha=rate)
                continue
            m, v = self.moments[name]
            m.lerp_(gradient, 0.1)
            v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            spread = (v / (1 - 0.999**self.taken)).sqrt_().add_(self.eps)
            leaf.addcdiv_(m, spread, value=-rate / (1 - 0.9**self.taken))


@torch.no_grad()
def drift_apart(leaves: Leaves, start: Arrays, drift: Drift) -> None:
    """Add `drift` to every gradient; `start` is theta as the client was sent it."""
    drift.applied = True
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        if drift.proximal:
            leaf.grad.add_(leaf - torch.from_numpy(np.array(start[name]))[None].to(leaf), alpha=drift.proximal)
        if name in drift.arrays:
            leaf.grad.add_(torch.from_numpy(np.array(drift.arrays[name]))[None].to(leaf))


def clip(leaves: Leaves, limit: float) -> float:
    """Scale all gradients so that their joint norm is at most `limit`; 0 leaves them. Returns the norm before."""
    squares = [float(leaf.grad.double().square().sum()) for leaf in leaves.values() if leaf.grad is not None]
    norm = math.sqrt(sum(squares))
    if limit and norm > limit:
        for leaf in leaves.values():
            if leaf.grad is not None:
                leaf.grad.mul_(limit / norm)
    return norm


def learning_rate(step: int, total: int, settings: Options) -> float:
    """eta of step 0 .. total-1: linear warm-up over ceil(warmup * total) steps, then linear decay towards 0."""
    warm = math.ceil(total * settings.warmup)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    return settings.learning_rate * max(0.0, (total - step) / max(1, total - warm))


# One client, one round


def minibatch(count: int, client: str, step: int, size: int, ctx: Context) -> tuple[int, list[int]]:
    """(number of the minibatch, its example indices) of a client's step 0, 1, ...: a function of seed, client, step.

    One shuffle of `count` examples makes the minibatches, so that their frozen hidden states can be kept; each pass
    over them has an order of its own.
    """
    batches = math.ceil(count / size)
    place = int(ctx.stream(f"visits/{client}", step // batches).permutation(batches)[step % batches])
    order = ctx.stream(f"order/{client}").permutation(count).tolist()
    return place, order[place * size : (place + 1) * size]


def one_step(
    slope: Slope,
    rule: StepRule,
    step: int,
    rate: float,
    client: str,
    data: Dataset,
    start: Arrays,
    settings: Options,
    ctx: Context,
) -> float:
    """Step number `step` of a client on its minibatch; the loss before it. `start` is theta as the client was sent
    it."""
    place, indices = minibatch(len(data), client, step, settings.batch_size, ctx)
    loss = slope(step, f"{client}/{place}", lambda: data.select(indices), rule.leaves)
    if ctx.drift is not None:
        drift_apart(rule.leaves, start, ctx.drift)
        ctx.drift.rates = rule.rates
    clip(rule.leaves, settings.clip)
    rule.step(rate)
    return loss


def work(
    slope: Slope,
    cost: int,
    data: Dataset,
    assignment: Assignment,
    settings: Options,
    ctx: Context,
    eps: float = 1e-8,
    kind: str = "delta",
    fresh: bool = False,
) -> Update:
    """`settings.steps` steps down `slope`, each costing `cost` forwards, from the theta of `assignment`.

    `kind` is `delta` or `weights`; the learning rate's schedule runs over all rounds or, `fresh`, anew in each. The
    scalars: `loss`, the mean over the steps of the loss before each, `steps` and `forwards`. DataError without
    examples, FederationError when a loss is not finite.
    """
    client, count, start = assignment.client, len(data), averaging.theta(assignment.arrays)
    if not count:
        raise DataError("has no examples", client)
    leaves = leaves_of(start, "cpu" if ctx.device.partition(":")[0] != "cuda" else ctx.device)
    rule = StepRule(leaves, settings.optimizer, settings.weight_decay, eps)
    first, losses = (assignment.round - 1) * settings.steps, []
    for step in range(first, first + settings.steps):
        at, total = (step - first, settings.steps) if fresh else (step, ctx.rounds * settings.steps)
        rate = learning_rate(at, total, settings)
        losses.append(one_step(slope, rule, step, rate, client, data, start, settings, ctx))
        if not math.isfinite(losses[-1]):
            raise FederationError("the training loss is not finite", client, "lower the learning rate")
    found: dict[str, Array] = {name: leaf.detach()[0].cpu().numpy() for name, leaf in leaves.items()}
    if kind == "delta":
        found = {name: array - start[name] for name, array in found.items()}
    scalars = {"loss": math.fsum(losses) / len(losses), "steps": len(losses), "forwards": cost * len(losses)}
    return Update(assignment.base, assignment.round, client, kind, found, count, "", scalars)


# The server


def initialise(model: ModelHandle, found: Objective) -> State:
    """theta_0. Where A and B train, the scalars tell their `scale`, alpha / r."""
    told: dict[str, Any] = {"forwards": 0, "steps": 0}
    if isinstance(found, Frozen) and found.trainables.spec.kind == "lora":
        told["scale"] = found.trainables.spec.scale
    return State(model.digest, 0, dict(found.initial), told)


def screen(
    updates: Sequence[Update], state: State, steps: int, cost: int, ctx: Context, kind: str = "delta"
) -> dict[str, str]:
    """Reject what is no `kind` of theta of the shapes that were sent, and counts other than those the clients were
    asked for: `steps` each, or as many as the assignment says."""
    reasons = {}
    for update in updates:
        told = update.scalars
        counts = told.get("steps"), told.get("forwards")
        asked = ctx.assigned[update.client].options if update.client in ctx.assigned else {}
        wanted = int(asked.get("steps") or steps)
        if update.kind != kind:
            reasons[update.client] = f"kind {update.kind[:40]!r} is not {kind!r}"
        elif counts != (wanted, wanted * cost) or any(type(count) is not int for count in counts):
            reasons[update.client] = "claims other steps than it was asked for"
        elif type(told.get("loss")) is not float or not math.isfinite(told["loss"]):
            reasons[update.client] = "claims an impossible loss"
    rest = [update for update in updates if update.client not in reasons]
    return reasons | averaging.screen(rest, state, ctx)


def aggregate(state: State, updates: Sequence[Update], ctx: Context) -> State:
    """FedAvg's mean of the changes on top of theta."""
    return fedavg.aggregate(state, updates, Config(), ctx)


def measure(subject: Any, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    """Loss and, for labelled data, balanced accuracy of theta in the middle of a run."""
    return measured(subject.sent, data, ctx) if isinstance(subject, State) else None


def personalise(model: ModelHandle, state: State, folder: Path, found: Objective) -> ModelHandle:
    """theta as a PEFT adapter folder on its base."""
    return written(found, folder, state.sent, model)
