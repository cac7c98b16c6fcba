"""Options that rules of this family share. A rule inherits them and adds its own."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_sdk.config import opt


@dataclass(frozen=True)
class Weighted:
    weighting: str = opt("examples", "weight of a client", choices=("examples", "equal"))
    cap: int = opt(0, "largest number of examples a client may claim; 0 means none", unit="examples", ge=0)


@dataclass(frozen=True)
class Adaptive(Weighted):
    server_rate: float = opt(1e-2, "eta, the server's step", ge=0)
    beta1: float = opt(0.9, "decay of the mean of changes", ge=0, le=0.999999)
    tau: float = opt(1e-3, "added to the root of v, which starts at tau^2; larger is less adaptive", ge=1e-12)


@dataclass(frozen=True)
class Forgetting(Adaptive):
    beta2: float = opt(0.99, "decay of the mean of squared changes", ge=0, le=0.999999)


@dataclass(frozen=True)
class Byzantine:
    byzantine: int = opt(
        -1, "f, hostile clients to withstand in a round of n; -1: (n - 3) / 2, less if the rule allows less", ge=-1
    )
