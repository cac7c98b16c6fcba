"""Wrong options: refused in the same words by the command line, by a TOML file and by Python."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk import config
from edgellm_sdk.cli import main as cli
from edgellm_sdk.config import opt
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.registry import get

INTEGERS = (
    "", " ", "ten", "1.5", "1e3", "0x10", "1_000", "٣", "３", "²", "⅔", "nan", "inf", "-inf", "1,5", "1 2", "--",
    "true", "None", "\u200b8", "8\u202e", "\x1b[2J", "9" * 30, "9" * 70, str(1 << 63), "0", "513", "-8", "eight", "८",
    "NaN", "+-1",
)  # fmt: skip
NUMBERS = (
    "", "nan", "NaN", "-nan", "inf", "Infinity", "-inf", "1e999", "-1e999", "one", "0,1", "1_0.0", "٣.٥", "0.1.2",
    "1e", "0x1p3", "-0.001", "-1e-300", "0.1%", "½", "--1",
)  # fmt: skip
CHOICES = (
    "", "Seeds", "seed", "tensor", " seeds", "none", "SEEDS", "seeds,tensors", "s\x00eeds", "1", "ѕeeds", "tensors ",
)  # fmt: skip
CASES = (
    *(("rank", value) for value in INTEGERS),
    *(("learning-rate", value) for value in NUMBERS),
    *(("wire", value) for value in CHOICES),
)
UNKNOWN = ("rnak", "Rank", "learning-rat", "optimiser", "x", "ranks", "ränk", "perturbation", "r", "-rank")
ASK = ("--model", "m", "--data", "d", "--output", "o")


def by_python(options: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        config.build(get("fwdllm").plugin.config, options, "fwdllm")
    return f"edgellm: {raised.value}\n"


def by_command_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = cli._guarded(cli.Call(["finetune", "--plugin", "fwdllm", *ASK, *words]))
    out, err = capsys.readouterr()
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    return err


def toml_text(value: str) -> str:
    """A TOML basic string, escapes included."""
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08X}" for c in value) + '"'


def by_toml(capsys: pytest.CaptureFixture[str], folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return by_command_line(capsys, "--config", str(path))


def test_there_are_sixty_kinds() -> None:
    assert len({*CASES, *UNKNOWN}) >= 60


@pytest.mark.parametrize(("name", "value"), CASES)
def test_bad_values_read_alike_on_three_paths(
    name: str, value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wanted = by_python({name: value})
    assert name in wanted
    assert by_toml(capsys, tmp_path, f"[options]\n{name} = {toml_text(value)}\n") == wanted
    if "\0" not in value:
        assert by_command_line(capsys, f"--{name}={value}") == wanted
        assert by_command_line(capsys, f"--{name}", value) == wanted


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_options_read_alike_on_three_paths(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wanted = by_python({name: "3"})
    assert "unknown option" in wanted
    assert by_toml(capsys, tmp_path, f'[options]\n"{name}" = "3"\n') == wanted
    assert by_command_line(capsys, f"--{name}=3") == wanted
    assert by_command_line(capsys, f"--{name}", "3") == wanted


@pytest.mark.parametrize("value", [True, [1], {"a": 1}, 1.5, -1, 1 << 70])
def test_typed_values_read_alike_in_toml_and_python(
    value: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = (
        {True: "true"}.get(value, str(value))
        if not isinstance(value, (list, dict))
        else {list: "[1]", dict: "{a = 1}"}[type(value)]
    )
    assert by_toml(capsys, tmp_path, f"[options]\nrank = {text}\n") == by_python({"rank": value})


def test_all_problems_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    told = by_command_line(capsys, "--rank", "x", "--tau", "-1", "--clients", "0", "--rnak", "3", "--cleints=3")
    for part in ("rank: 'x'", "tau: ", "clients: 0" if "clients: 0" in told else "clients: ", "'rank'?", "'clients'?"):
        assert part in told


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    from edgellm_sdk.cli.train import VERBS
    from edgellm_sdk.cli.verb import build, take_apart

    path = tmp_path / "c.toml"
    path.write_text(
        'plugin = "fwdllm"\nmodel = "m"\ndata = "d"\noutput = "o"\nclients = 8\n[options]\nrank = 4\ntau = 1\n'
    )
    loaded = get("fwdllm")
    typed = take_apart(VERBS[0], ["--config", str(path)])
    assert typed.plugin == "fwdllm"
    typed = take_apart(VERBS[0], ["--config", str(path), "--rank", "2"], loaded)
    made, options = build(VERBS[0], loaded, {"option_rank": "2", "setting_clients": "9"}, typed)
    assert (made.clients, made.model) == (9, "m")
    assert options == {"rank": 2, "tau": 1.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("clients = ", "not valid TOML"),
        ("clients = 1\nclients = 2", "not valid TOML"),
        ("\ufeffclients = 1", "byte-order mark"),
        ("x = nan", "not a finite number"),
        ("a = " + "[" * 80 + "]" * 80, "nested deeper"),
        ("options = 3", "is not a table"),
        ("[optoins]\nrank = 3", "unknown option 'optoins'"),
        ("cleints = 3", "did you mean 'clients'?"),
    ],
)
def test_malformed_files_are_one_line(
    text: str, reason: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert reason in by_toml(capsys, tmp_path, text)


def test_unreadable_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "cannot read" in by_command_line(capsys, "--config", str(tmp_path / "none.toml"))
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * ((1 << 20) + 1))
    assert "larger than 1 MiB" in by_command_line(capsys, "--config", str(big))
    big.write_bytes(b'a = "\xff"')
    assert "not UTF-8" in by_command_line(capsys, "--config", str(big))


@dataclass(frozen=True)
class _Sample:
    count: int = opt(3, "a count", ge=0, le=9)
    share: float = opt(0.5, "a share", ge=0, le=1)
    name: str = opt("x", "a name")
    on: bool = opt(True, "a switch")
    limit: int | None = opt(None, "an optional limit", ge=1)


@given(
    st.dictionaries(
        st.sampled_from(["count", "share", "name", "on", "limit", "?"]), st.text() | st.floats() | st.integers()
    )
)
@settings(max_examples=200, deadline=None)
def test_any_value_is_taken_or_refused_in_one_line(values: dict[str, Any]) -> None:
    try:
        made = config.build(_Sample, values, "sample")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert config.build(_Sample, config.as_dict(made), "sample") == made


def test_the_real_command_agrees() -> None:
    words = ["finetune", "--plugin", "fwdllm", *ASK, "--rank", "٣"]
    done = subprocess.run([sys.executable, "-m", "edgellm_sdk.cli.main", *words], capture_output=True, check=False)
    assert done.returncode == 3
    assert done.stderr.decode() == by_python({"rank": "٣"})
