"""`doctor`, `models info`, `data info` and `help exit-codes`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm_sdk import registry
from edgellm_sdk.cli.screen import facts, size, table
from edgellm_sdk.cli.verb import Answer, Request, Verb
from edgellm_sdk.errors import PluginError
from edgellm_sdk.settings import DataInfo
from edgellm_sdk.types import DeviceInfo

EXIT_CODES = (
    (0, "done"),
    (1, "our bug; the line says where the crash file is"),
    (2, "the command line makes no sense"),
    (3, "an option, a configuration file or a recipe is wrong"),
    (4, "a plugin is missing, broken or misbehaved"),
    (5, "the user's data"),
    (6, "a model, adapter or GGUF file, or an exported file that does not behave like its model"),
    (7, "hardware, a backend or memory"),
    (8, "the federation: quorum, deadline, peers"),
    (9, "a privacy budget is exhausted or a claim is unprovable"),
    (10, "storage: full, locked, not permitted"),
    (130, "interrupted (SIGINT); --resume continues"),
    (143, "terminated (SIGTERM); --resume continues"),
)


def doctor(request: Request) -> Answer:
    """What this machine offers, asked of every backend plugin."""
    from edgellm_sdk.models import cache_folder
    from edgellm_sdk.report import environment

    found = [info for source in registry.sources() for info in _probe(source)]
    cache = cache_folder()
    existing = next((folder for folder in (cache, *cache.parents) if folder.exists()), Path("/"))
    space = shutil.disk_usage(existing)
    about = environment()
    rows = [(info.name, info.available, _details(info)) for info in found]
    value = {
        "backends": [
            {"name": i.name, "available": i.available, "reason": i.reason, "details": dict(i.details)} for i in found
        ],
        "environment": about,
        "cache": {"path": str(cache), "free_bytes": space.free},
    }
    text = [
        table(("backend", "available", "details"), rows),
        facts(
            [
                ("processor", about["cpu"]),
                ("cores", about["cores"]),
                ("memory", size(about["memory_bytes"])),
                ("cache", f"{cache} ({size(space.free)} free)"),
                ("edgellm", f"{about['edgellm']} on Python {about['python']}, {about['platform']}"),
            ]
        ),
    ]
    return Answer(value, "\n\n".join(text))


def _probe(source: registry.Source) -> list[DeviceInfo]:
    """What one plugin's probe says; a plugin that cannot be loaded or asked says why instead."""
    if source.origin == "built-in" and not source.module.startswith("edgellm_hardware"):
        return []
    try:
        loaded = registry.load(source)
        if "edgellm_probe" not in loaded.hooks:
            return []
        info = loaded.module.edgellm_probe()
    except PluginError as error:
        return [DeviceInfo(source.name, False, error.what)]
    except Exception as error:  # a probe must not raise; the table shall say who did
        return [DeviceInfo(source.name, False, f"its probe failed: {type(error).__name__}")]
    return [info] if isinstance(info, DeviceInfo) else []


def _details(info: DeviceInfo) -> str:
    if not info.available:
        return info.reason
    return ", ".join(
        f"{name.removesuffix('_bytes').replace('_', ' ')} {size(value)}"
        if name.endswith("_bytes") and isinstance(value, (int, float))
        else f"{name.replace('_', ' ')} {value}"
        for name, value in info.details.items()
        if value not in ("", None)
    )


def models_info(request: Request) -> Answer:
    from edgellm_sdk import models

    about = models.describe(models.resolve(request.words[0]))
    return Answer(about, _facts(about))


def data_info(request: Request) -> Answer:
    from edgellm_sdk import data

    settings: DataInfo = request.settings
    about = data.describe(data.read(request.words[0], settings.split, settings.task_prompt or None))
    return Answer(about, _facts(about))


def _facts(about: Mapping[str, Any]) -> str:
    pairs: list[tuple[str, Any]] = []
    for name, value in about.items():
        plain = name.replace("_", " ")
        if isinstance(value, Mapping):
            pairs += [(f"{plain}: {key}", _short(item)) for key, item in value.items()]
        elif name in ("bytes", "size"):
            pairs.append((plain, size(value)))
        else:
            pairs.append((plain, _short(value)))
    return facts(pairs)


def _short(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = " / ".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in value)
    if isinstance(value, str) and len(value) > 300:
        return value[:300] + "..."
    return value


def exit_codes(request: Request) -> Answer:
    return Answer(
        [{"code": code, "meaning": meaning} for code, meaning in EXIT_CODES], table(("code", "meaning"), EXIT_CODES)
    )


VERBS = (
    Verb("doctor", "What this machine has: processor, memory, CUDA, llama.cpp, space for the cache.", doctor),
    Verb("models info", "What a model is.", models_info, words="MODEL", least=1, most=1),
    Verb("data info", "What a data set holds; shows its first example.", data_info, DataInfo, "DATA", 1, 1),
    Verb("help exit-codes", "What the exit codes mean.", exit_codes),
)
