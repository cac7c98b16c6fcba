"""What the processor offers, read from the system without torch. Never raises."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from edgellm_sdk.types import DeviceInfo, Scalar

# kernel's name: ours; x86 first, then Arm, whose kernel calls NEON `asimd`
_FEATURES = {
    "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx512f": "avx512", "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni", "amx_bf16": "amx_bf16", "amx_int8": "amx_int8",
    "neon": "neon", "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve",
}  # fmt: skip


def cpu_facts(text: str) -> tuple[str, list[str]]:
    """(model name, features) from the text of /proc/cpuinfo; empty where it does not say."""
    name = ""
    features: list[str] = []
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and not name:
            name = value.strip()[:80]
        elif key.strip() in ("flags", "Features") and not features:
            present = set(value.split())
            features = sorted({ours for kernel, ours in _FEATURES.items() if kernel in present})
    return name, features


def probe() -> DeviceInfo:
    details: dict[str, Scalar] = {"machine": platform.machine()}
    try:
        name, features = cpu_facts(Path("/proc/cpuinfo").read_text(errors="replace"))
        details |= {"processor": name, "features": " ".join(features)}
    except OSError:
        pass
    try:
        details["threads"] = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        details["threads"] = os.cpu_count() or 1
    try:
        import psutil

        memory = psutil.virtual_memory()
        details |= {
            "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
            "memory_bytes": int(memory.total),
            "memory_free_bytes": int(memory.available),
        }
    except (ImportError, OSError, RuntimeError):
        pass
    return DeviceInfo("cpu", True, details=details)
