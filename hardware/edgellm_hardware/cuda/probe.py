"""Which NVIDIA GPUs the driver knows, through libcuda alone: milliseconds, and no torch. Never raises."""

from __future__ import annotations

import ctypes
from importlib import metadata

from edgellm_sdk.types import DeviceInfo, Scalar


def probe() -> DeviceInfo:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return DeviceInfo("cuda", False, "no NVIDIA driver (libcuda.so.1) on this machine")
    count = ctypes.c_int(0)
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code or not count.value:
        return DeviceInfo("cuda", False, f"the NVIDIA driver reports no usable GPU (code {code})")
    details: dict[str, Scalar] = {"gpus": count.value}
    name, memory, device = ctypes.create_string_buffer(128), ctypes.c_size_t(0), ctypes.c_int(0)
    if driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        details |= {"gpu": name.value.decode("utf-8", "replace"), "memory_bytes": memory.value}
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    if torch.endswith("+cpu") or torch == "none":
        return DeviceInfo("cuda", False, f"a GPU is here but torch ({torch}) is built without CUDA", details)
    return DeviceInfo("cuda", True, details=details)
