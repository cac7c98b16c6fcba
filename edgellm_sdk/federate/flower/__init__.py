"""The rounds over a real network, carried by Flower: its Fleet protocol (gRPC), its node authentication, its simulator.

    hub.py         the server's end: Flower's link state and Fleet servicer in this process, on one port
    front.py       that port: counts every byte, refuses what is no TLS 1.3, drops connections that never authenticate
    gate.py        what each authenticated node may do
    link.py        a client's end: pull, work, push, over gRPC
    enrol.py       who takes part: the server's offer and the clients' answers
    parts.py       our messages in Flower's records, in parts
    simulation.py  Flower's simulation engine instead of a network

A client runs the plugins installed on it and never code that a server sends: no Flower app bundle is exchanged, and of
Flower's three interfaces only Fleet is opened. `pip install 'edgellm-sdk[flower]'`.
"""

from __future__ import annotations

import importlib.util
import os

from edgellm_sdk.errors import PluginError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GRPC_VERBOSITY": "ERROR",
    "FLWR_LOG_LEVEL": "CRITICAL",
}


def prepare(simulation: bool = False) -> None:
    """Call before anything else of this package. PluginError when Flower is not installed.

    Flower and Ray read these when they are imported: nothing is reported to anyone, nothing is installed.
    """
    os.environ.update(QUIET)
    for name in ("flwr", "grpc", "cryptography", *(("ray",) if simulation else ())):
        if importlib.util.find_spec(name) is None:
            raise PluginError(f"{name} is not installed", "federation", "pip install 'edgellm-sdk[flower]'")
    import logging

    import flwr.supercore.logger  # noqa: F401 - it sets the level, so it comes first

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
