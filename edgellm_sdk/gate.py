"""The gate: does an exported file behave like the model it was made from? Run it where it will run, and compare.

Every check has a value, a bound and a sentence. Facts and weights are compared on the files (see `ledger`), behaviour
on two live sessions: token ids, per-token KL divergence and top-1 agreement, greedy continuation, where it stops.

The bounds follow from what the file stores. Kullback-Leibler divergences are in nats, mean over positions, reference
against candidate; what clean files of SmolLM2-135M give is in `cookbook/benchmarks/results/gate.json`.
"""

from __future__ import annotations

import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk import ledger, registry
from edgellm_sdk.config import build
from edgellm_sdk.errors import ConfigError, EdgeLLMError, GateError, ModelError
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Artifact, ModelHandle, Prompt, Session

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Array, Float32, Generation

ROWS_AT_ONCE = 64
CONTINUATION = 24
LONGEST_PROMPT = 448
# Text that tokenizers disagree on when something is wrong: digits, case, spaces, scripts, controls, special tokens.
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "FREE entry! Win 1,000 pounds now, call 09061701461 by 31/12/2026 http://a.example/?q=1&r=%20",
    "I'm, you've, WE'LL, don't, 'tis... (really?) [ok] {x: 1} <y> \"quoted\" `code` #tag @name $5.99 50%",
    "  two  spaces\tand tabs\t\tand\nnew lines\r\n\n\n   trailing   ",
    "naïve café, Übergröße, El Niño, ﬁne ½ ² №",
    "Привет, мир! Ελληνικά שלום مرحبا नमस्ते ไทย 中文字符 日本語テスト 한국어",
    "emoji 😀👍🏽👩‍👩‍👧 e\u0301 \u200bzero\u00a0width",
    "def f(x):\n    return {'a': x**2 + 3.14e-10, \"b\": [i for i in range(10)]}  # ok",
    "1234567890 12 345 0x1F 1e6 ٣٤٥ Ⅷ",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|></s><s>[INST]",
    "a",
    " ",
    "\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa HelloWorldCamelCase snake_case_name SCREAMING",
)


@dataclass(frozen=True)
class Tolerance:
    """Bounds. `kl_mean`, `kl_p99` in nats; `top1` the least share of positions that agree; `tie` in nats: when the
    reference prefers its own choice to the candidate's by less, the difference is a near tie and no disagreement."""

    kl_mean: float
    kl_p99: float
    top1: float
    tie: float


FLOAT32 = Tolerance(1e-4, 1e-3, 0.99, 0.02)
HALF = Tolerance(1e-3, 1e-2, 0.99, 0.1)
BLOCKS = Tolerance(0.02, 0.15, 0.95, 0.5)
ROUNDED = {"Q8_0": Tolerance(0.03, 0.3, 0.93, 1.0), "Q6_K": Tolerance(0.1, 1.0, 0.9, 1.5)}
ROUNDED_FAR = Tolerance(1.5, 10.0, 0.4, 8.0)


def tolerance_for(types: Mapping[str, int], rounded: Sequence[str]) -> Tolerance:
    """Bounds for a file whose matrices have `types`, of which `rounded` do not hold the source's weights exactly.

    Behind each, what a clean file of SmolLM2-135M gave over 401 positions (mean KL, 99th percentile, raw agreement):

    - F32 holds them exactly and computes in float32: 1.5e-6, 1.8e-5, 1.000.
    - F16 and BF16 round weights and, in llama.cpp's products, activations too: 7.6e-6, 5.1e-5, 1.000 and 2.5e-4,
      1.2e-3, 0.998.
    - Quantised blocks that carry the source's own codes differ by llama.cpp's 8-bit activations only: 4.9e-3, 0.027,
      0.973 (Q4_1).
    - Blocks that the exporter rounded itself lose what that type loses: Q8_0 7.5e-3, 0.040, 0.963; Q4_0 0.51, 2.5,
      0.631. For the latter the weights check is the sharp one; this bound only catches nonsense.
    """
    floats = {"F32", "F16", "BF16"}
    far = set(rounded) - floats - set(ROUNDED)
    if far:
        return ROUNDED_FAR
    if set(rounded) - floats:
        return max((ROUNDED[name] for name in rounded if name in ROUNDED), key=lambda t: t.kl_mean)
    if set(types) - floats:
        return BLOCKS
    return HALF if set(types) - {"F32"} else FLOAT32


@dataclass(frozen=True)
class Check:
    """One comparison: `value` against `bound` (numbers or None), `detail` says what differs, or on what it held."""

    name: str
    passed: bool
    value: float | None
    bound: float | None
    detail: str


@dataclass(frozen=True)
class GateResult:
    """All checks, how many `prompts` and `positions` they rest on, and the tolerance they were held against."""

    checks: tuple[Check, ...]
    prompts: int
    positions: int
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """What differs, in one line; empty when everything passed."""
        return "; ".join(f"{check.name}: {check.detail}" for check in self.checks if not check.passed)

    def value(self, name: str) -> float | None:
        """The value of the check called `name`, or None."""
        return next((check.value for check in self.checks if check.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values for the report; what is not finite becomes None."""
        checks = [
            {name: None if value in (inf, -inf) or value != value else value for name, value in asdict(check).items()}
            for check in self.checks
        ]
        return {**asdict(self), "checks": checks, "passed": self.passed, "reason": self.reason}


def check(
    reference: Session,
    candidate: Session,
    prompts: Sequence[Prompt],
    tolerance: Tolerance,
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    weights: ledger.WeightReport | None = None,
    max_tokens: int = CONTINUATION,
) -> GateResult:
    """Compare two sessions on `prompts` (at least one) and the file's facts with the source's.

    `expected` and `found` come from `ledger.expected_facts` and `ledger.found_facts`. Logits are only compared when
    both vocabularies have one size.
    """
    wrong = ledger.differences(expected, found)
    checks = [_verdict("facts", wrong, len(expected), "facts agree")]
    if weights is not None:
        bad = [*weights.problems, *([weights.worst] if weights.ratio > 1 else [])]
        detail = "; ".join(bad[:3]) or f"{weights.compared} tensors agree"
        checks.append(Check("weights", not bad, weights.ratio, 1.0, detail))
    same_size = reference.vocabulary == candidate.vocabulary
    detail = f"{candidate.vocabulary} logits, not {reference.vocabulary}" if not same_size else "same size"
    checks.append(Check("vocabulary", same_size, candidate.vocabulary, reference.vocabulary, detail))
    checks += [_token_ids(reference, candidate, prompts), _stop_ids(reference, candidate)]
    if not same_size:
        return GateResult(tuple(checks), len(prompts), 0, tolerance)
    behaviour = _Behaviour(reference, candidate, tolerance)
    longest = min(LONGEST_PROMPT, int(found.get("context_length", LONGEST_PROMPT + max_tokens)) - max_tokens)
    for prompt in prompts:
        ids = reference.prompt_ids(prompt)[:longest]
        if ids:
            behaviour.add(ids, max_tokens)
    if not behaviour.positions:
        raise ConfigError("the gate's prompts hold no token", fix="give it data with text")
    checks += behaviour.checks()
    return GateResult(tuple(checks), len(prompts), behaviour.positions, tolerance)


def _verdict(name: str, problems: Sequence[str], total: int, praise: str) -> Check:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    detail = "; ".join(problems[:3]) + more if problems else f"{total} {praise}"
    return Check(name, not problems, len(problems), 0, detail)


def _token_ids(reference: Session, candidate: Session, prompts: Sequence[Prompt]) -> Check:
    """Ids of plain texts, and of prompts as each engine would feed them."""
    problems = []
    for text in TEXTS:
        ids, have = reference.encode(text), candidate.encode(text)
        composed = unicodedata.normalize("NFC", text)
        if ids != have and ids == reference.encode(composed):
            have = candidate.encode(composed)  # the model's tokenizer composes letters, the engine's has no such step
        problems += _difference(f"text {text[:24]!r}", ids, have)
    for place, prompt in enumerate((*prompts, *TEXTS[:2])):
        try:
            problems += _difference(f"prompt {place}", reference.prompt_ids(prompt), candidate.prompt_ids(prompt))
        except EdgeLLMError as error:
            problems.append(f"prompt {place}: {error.what}")
    return _verdict("token ids", problems, len(TEXTS) + len(prompts) + 2, "texts give the same ids")


def _difference(what: str, want: list[int], have: list[int]) -> list[str]:
    if want == have:
        return []
    place = next((i for i, pair in enumerate(zip(want, have, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(want), len(have)) if place is None else place
    return [f"{what} differs at token {place}: {have[place : place + 3]}, not {want[place : place + 3]}"]


def _stop_ids(reference: Session, candidate: Session) -> Check:
    """Every id that ends the reference must end the candidate. An engine may know further end markers by their text
    (llama.cpp does), but an ordinary word must not be one."""
    problems = [f"{token} does not end a text" for token in reference.eos if token not in candidate.eos]
    for token in candidate.eos:
        text = candidate.decode([token]).strip()
        marker = len(text) > 2 and (text[0], text[-1]) in (("<", ">"), ("[", "]"), ("<", "\uff5e"))
        if token not in reference.eos and not marker:
            problems.append(f"{token} ({text[:20]!r}) ends a text")
    return _verdict("stop ids", problems, len(reference.eos), "end ids shared")


def divergence(reference: Float32, candidate: Float32) -> tuple[Array, Array, Array]:
    """Row by row over (n, vocabulary) logits: (KL(reference || candidate) in nats, whether the top choices agree, by
    how many nats the reference prefers its own choice to the candidate's), each (n,)."""
    import numpy as np

    from edgellm_sdk.kit.scoring import log_softmax

    kl, agree, gap = [], [], []
    for start in range(0, max(len(reference), 1), ROWS_AT_ONCE):
        p = log_softmax(reference[start : start + ROWS_AT_ONCE])
        q = log_softmax(candidate[start : start + ROWS_AT_ONCE])
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        ours, theirs, rows = p.argmax(axis=1), q.argmax(axis=1), np.arange(len(p))
        agree.append(ours == theirs)
        gap.append(p[rows, ours] - p[rows, theirs])
    return np.concatenate(kl), np.concatenate(agree), np.concatenate(gap)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Behaviour:
    """Collects what both sessions do on one prompt after the other. Prompts may begin alike, with a template or a
    system message: what follows the same tokens counts once, or a single position could be one in a hundred."""

    def __init__(self, reference: Session, candidate: Session, tolerance: Tolerance) -> None:
        self._reference, self._candidate, self._tolerance = reference, candidate, tolerance
        self._kl: list[Array] = []
        self._agree: list[Array] = []
        self._gap: list[Array] = []
        self._read: list[list[int]] = []
        self._greedy: list[str] = []
        self._stops: list[str] = []
        self._generations = self._equal = self._ended = 0
        self.positions = 0

    def add(self, ids: list[int], max_tokens: int) -> None:
        """Both greedy continuations of `ids`, and both distributions after every token of the reference's."""
        want = self._reference.generate(ids, max_tokens)
        have = self._candidate.generate(ids, max_tokens)
        sequence = [*ids, *want.tokens]
        ours, theirs = (s.logits([sequence], [0])[0] for s in (self._reference, self._candidate))
        known = max((_alike(sequence, other) for other in self._read), default=0)
        self._read.append(sequence)
        kl, agree, gap = divergence(ours[known:], theirs[known:])
        self._kl.append(kl)
        self._agree.append(agree)
        self._gap.append(gap)
        self.positions += len(kl)
        self._generations += 1
        self._continuation(ours[len(ids) - 1 :], theirs[len(ids) - 1 :], want, have)

    def _continuation(self, ours: Float32, theirs: Float32, want: Generation, have: Generation) -> None:
        """`ours[i]`, `theirs[i]`: logits for token i of the continuation."""
        same = 0
        while same < min(len(want.tokens), len(have.tokens)) and want.tokens[same] == have.tokens[same]:
            same += 1
        where = f"prompt {self._generations - 1}, token {same}"
        if want.stop == "eos":
            self._ended += 1
            last = ours[len(want.tokens)]
            lead = float(last.max() - last[int(theirs[len(want.tokens)].argmax())])
            if int(theirs[len(want.tokens)].argmax()) not in self._candidate.eos and not lead <= self._tolerance.tie:
                self._stops.append(f"prompt {self._generations - 1} goes on where the model stops")
        if want.tokens == have.tokens:
            self._equal += 1
            if want.stop != have.stop and not (want.stop == "eos" and self._near_tie(ours, theirs, len(want.tokens))):
                self._stops.append(f"prompt {self._generations - 1} ends by {have.stop}, not {want.stop}")
            return
        if have.stop == "eos" and same == len(have.tokens) and want.tokens[same] in self._candidate.eos:
            return  # one of the engine's own end markers, judged under `stop ids`
        if not self._near_tie(ours, theirs, same, have):
            self._greedy.append(f"{where}: differs by more than a near tie")

    def _near_tie(self, ours: Float32, theirs: Float32, place: int, have: Generation | None = None) -> bool:
        """Whether the reference hardly prefers its own token at `place` to the candidate's."""
        if have is not None and place < len(have.tokens):
            other = have.tokens[place]
        else:
            other = int(theirs[place].argmax())
        return float(ours[place].max() - ours[place][other]) <= self._tolerance.tie

    def checks(self) -> list[Check]:
        import numpy as np

        t = self._tolerance
        kl, agree, gap = np.concatenate(self._kl), np.concatenate(self._agree), np.concatenate(self._gap)
        mean, p99, worst = float(kl.mean()), float(np.quantile(kl, 0.99)), float(kl.max())
        raw, excused = float(agree.mean()), float((agree | (gap <= t.tie)).mean())
        rows = f"{len(kl)} positions"
        return [
            Check("kl mean", mean <= t.kl_mean, mean, t.kl_mean, f"{mean:.3g} nats over {rows}"),
            Check("kl p99", p99 <= t.kl_p99, p99, t.kl_p99, f"{p99:.3g} nats, largest {worst:.3g}, over {rows}"),
            Check("top-1", excused >= t.top1, excused, t.top1, f"{raw:.4f} agree, {excused:.4f} with near ties"),
            _verdict("continuation", self._greedy, self._generations, f"continuations, {self._equal} token for token"),
            _verdict("stop", self._stops, self._ended, "continuations end as the model's do"),
        ]


def verify_export(
    handle: ModelHandle,
    artifact: Artifact,
    ctx: Context,
    prompts: Sequence[Prompt],
    tolerance: Tolerance | None = None,
    base: Path | None = None,
) -> GateResult:
    """Run the first file of `artifact` in llama.cpp and hold it against `handle` in torch, float32, on `prompts`.

    A lone adapter runs on `base`, an exported base model; without one the base is exported in F32 for the occasion.
    `tolerance` None takes `tolerance_for`. A file that cannot be read or run is a failed check; DeviceError when this
    machine cannot run any.
    """
    if not prompts:
        raise ConfigError("the gate needs at least one prompt")
    if artifact.verified.get("kind") != "adapter":
        return _verify(handle, artifact.path, None, ctx, prompts, tolerance)
    near = ctx.folder if ctx.folder.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=".gate.", suffix=".tmp", dir=near) as folder:
        if base is None:
            relay = _relay(artifact.target, {"type": "f32", "modelfile": False})
            base = relay.export(replace(handle, adapters=()), Path(folder) / "base.gguf", ctx).path
        return _verify(handle, base, artifact.path, ctx, prompts, tolerance or HALF)


def _verify(
    handle: ModelHandle,
    path: Path,
    adapter: Path | None,
    ctx: Context,
    prompts: Sequence[Prompt],
    tolerance: Tolerance | None,
) -> GateResult:
    from edgellm_sdk.gguf_file import read

    candidate = reference = None
    try:
        file = read(path)
        expected, found = ledger.expected_facts(handle), ledger.found_facts(file)
        if adapter is None:
            weights = ledger.compare_weights(handle, file)
        else:
            weights = ledger.compare_adapter(handle.adapters[-1] if handle.adapters else None, file, read(adapter))
        if tolerance is None:
            types = ledger.tensor_types(file)
            tolerance = tolerance_for(types, weights.rounded if weights else tuple(types))
        files = (path, adapter) if adapter else (path,)
        subject = Artifact(files, ("",) * len(files), "gguf", "llama_cpp", handle.digest)
        candidate = _relay("llama_cpp", {}).deploy(subject, "llama_cpp", ctx)
        if adapter is not None:
            adaptable: Any = candidate
            adaptable.adapt([(adapter.absolute(), 1.0)])
        reference = _relay("cpu", {}).deploy(handle, "cpu", ctx)
        expected["add_bos"] = reference.prompt_ids(TEXTS[0]) != reference.encode(TEXTS[0])
        return check(reference, candidate, prompts, tolerance, expected, found, weights)
    except ModelError as error:
        failure = Check("runs", False, None, None, f"{error.what} ({error.where})" if error.where else error.what)
        return GateResult((failure,), len(prompts), 0, tolerance or FLOAT32)
    finally:
        for session in (candidate, reference):
            if session is not None:
                session.close()


def _relay(name: str, options: Mapping[str, Any]) -> Relay:
    loaded = registry.get(name)
    return Relay([loaded], {loaded.plugin.name: build(loaded.plugin.config, options, name)})


def enforce(result: GateResult, artifact: Artifact) -> None:
    """Nothing when the gate passed. Else keep the file aside as `<stem>.rejected.gguf` and raise GateError."""
    if result.passed:
        return
    path = artifact.path
    aside = path.with_name(f"{path.stem}.rejected{path.suffix}")
    try:
        path.replace(aside)
        kept = f"kept as {aside.name}"
    except OSError as error:
        kept = f"still in place: {error.strerror}"
    raise GateError(f"does not behave like its model: {result.reason[:240]}", str(path), kept)
