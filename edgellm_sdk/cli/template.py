"""`edgellm plugins new`: a package from the templates in `edgellm_sdk/assets/plugin_template`."""

from __future__ import annotations

import keyword
import re
import sys
from importlib import resources
from pathlib import Path

from edgellm_sdk import __version__, registry, store
from edgellm_sdk.errors import ConfigError, StorageError, UsageError

SUMMARIES = {
    "finetune": "random search on norm gains, in a federation",
    "aggregate": "coordinate-wise median of client updates",
    "compress": "float16 weights rounded to a few significant bits",
    "export": "one safetensors file with everything in it",
}
_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


def write_package(name: str, stage: str, folder: Path) -> list[str]:
    """Write the package; the paths of its files within `folder`. ConfigError for a name that cannot be one."""
    package = name.replace("-", "_")
    if not _NAME.fullmatch(name) or len(name) > 60:
        raise UsageError(f"{name!r} is no name for a plugin", "NAME", "use small letters, digits and single dashes")
    if keyword.iskeyword(package) or package in sys.stdlib_module_names or package.startswith("edgellm_"):
        raise UsageError(f"{name!r} is taken by Python or edgellm", "NAME", "choose another")
    if name in {source.name for source in registry.sources()}:
        raise ConfigError(f"there is already a plugin {name!r}", "NAME", "choose another")
    if folder.exists() and any(folder.iterdir()):
        raise StorageError("the folder is not empty", str(folder), "choose another --output")
    values = {
        "@NAME@": name, "@PACKAGE@": package, "@STAGE@": stage, "@SUMMARY@": SUMMARIES[stage],
        "@VERSION@": __version__,
    }  # fmt: skip
    written = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"src/{package}/__init__.py": f"{stage}_init.py",
        f"src/{package}/method.py": f"{stage}_method.py",
        "tests/test_plugin.py": "test_plugin.py",
        "tests/test_method.py": f"{stage}_test.py",
    }
    templates = resources.files("edgellm_sdk") / "assets" / "plugin_template"
    for target, source in written.items():
        text = (templates / f"{source}.txt").read_text(encoding="utf-8")
        for mark, value in values.items():
            text = text.replace(mark, value)
        store.write_bytes(folder / target, text.encode())
    return sorted(written)
