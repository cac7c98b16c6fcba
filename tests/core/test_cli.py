"""The command: exit codes, one line on stderr, JSON alone on stdout, odd words, signals, full disks."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgellm_sdk import page
from edgellm_sdk.cli import main as cli
from edgellm_sdk.cli import show
from edgellm_sdk.cli.screen import size, table
from edgellm_sdk.report import Report
from edgellm_sdk.types import Metric

EDGELLM = (sys.executable, "-m", "edgellm_sdk.cli.main")
TRAINING = ["finetune", "-p", "fwdllm", "-m", "x", "-d", "sms-spam", "-o", "y"]
ROWS = "".join(
    json.dumps({"text": f"{text} {n}", "label": label}) + "\n"
    for n in range(10)
    for text, label in (("win a free prize", "spam"), ("see you at eight", "ham"))
)


def edgellm(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EDGELLM, *words], capture_output=True, text=True, timeout=300, check=False, **more)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command run in this process."""
    code = cli._guarded(cli.Call(list(words)))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my.jsonl"
    path.write_text(ROWS)
    return path


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["finetun"], 2, "did you mean 'finetune'?"),
        (["plugins", "lst"], 2, "did you mean 'list'?"),
        (["--frobnicate"], 2, "no option --frobnicate"),
        (["finetune"], 2, "needs --plugin NAME"),
        (["finetune", "--plugin", "fwdllm"], 2, "needs --model, --data, --output"),
        (["finetune", "--plugin"], 2, "needs --plugin NAME"),
        (["finetune", "--plugin", "fwdllm", "--rank"], 2, "--rank"),
        (["finetune", "--plugin", "fwdlm"], 4, "did you mean 'fwdllm'?"),
        (["finetune", "--plugin", "gguf"], 4, "does not finetune"),
        (["compress", "--plugin", "optq", "--model", "x", "--output", "y", "--bits", "4"], 3, "unknown option 'bits'"),
        (["models", "info"], 2, "needs MODEL"),
        (["models", "info", "no-such-model"], 6, "no-such-model"),
        (["models", "info", "a", "b"], 2, "does not understand 'b'"),
        (["data", "info", "none.jsonl"], 5, "none.jsonl"),
        (["data", "info", "sms-spam", "--split", "tset"], 3, "did you mean 'test'?"),
        (["deploy"], 2, "needs FILE"),
        (["deploy", "x.gguf", "dance"], 2, "say generate or chat"),
        (["deploy", "none.gguf", "--prompt", "hi"], 6, "none.gguf"),
        (["deploy", "none.gguf", "chat", "--json"], 2, "no JSON"),
        (["eval", "none.gguf"], 2, "needs --data"),
        (["run", "none.toml", "--output", "x"], 3, "none.toml"),
        (["plugins", "info", "\x1b[31mred"], 4, "\\x1b[31mred"),
        ([*TRAINING, "--device", "llama_cpp", "--llama-cpp-contxts", "2"], 3, "'contxts', did you mean 'contexts'?"),
        ([*TRAINING, "--device", "llama.cpp", "--llama-cpp-contexts", "0"], 3, "contexts: 0 is outside 1..64"),
        ([*TRAINING, "--device", "llama_cpp", "--contexts", "2"], 3, "did you mean 'llama-cpp-contexts'?"),
        ([*TRAINING, "--device", "executorch", "--executorch-queries=x"], 3, "queries: 'x' is not a whole number"),
        ([*TRAINING, "--llama-cpp-contexts", "2"], 3, "unknown option 'llama-cpp-contexts'"),
        ([*TRAINING, "--device", "llama_cp"], 4, "did you mean 'llama-cpp'?"),
        ([*TRAINING, "--device", "gguf"], 4, "no method can train on 'gguf'"),
        (["help", "exit-cods"], 2, "did you mean 'exit-codes'?"),
    ],
)
def test_mistakes_are_one_line_and_a_code(
    words: list[str], code: int, part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    got, out, err = told(capsys, *words)
    assert (got, out) == (code, ""), err
    assert err.startswith("edgellm: ")
    assert err.count("\n") == 1
    assert part in err
    assert "\x1b" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["plugins", "list"], ["plugins"], ["plugins", "info", "gptq"], ["doctor"], ["help", "exit-codes"],
        ["data", "info", "sms-spam"], ["plugins", "doctor"],
    ],
)  # fmt: skip
def test_json_is_alone_on_stdout(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = told(capsys, *words, "--json")
    assert (code, err) == (0, "")
    value = json.loads(out)
    assert value
    assert out == json.dumps(value, indent=2) + "\n"
    code, text, err = told(capsys, *words)
    assert (code, err) == (0, "")
    assert text.strip()


def test_models_info(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, "models", "info", str(tiny_llama), "--json")
    assert code == 0
    assert json.loads(out)["layers"] == 2
    assert "vocabulary" in told(capsys, "models", "info", str(tiny_llama))[1]


@pytest.mark.parametrize("verb", ["finetune", "aggregate", "compress", "export"])
def test_help_lists_the_plugins_of_a_stage(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, verb, "--help")
    assert code == 0
    assert "See a plugin's own options with" in out
    assert f"edgellm {verb} --plugin" in " ".join(out.split())
    assert told(capsys, "help", verb)[1] == out


def test_help_shows_bounds_units_and_choices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setenv("TERMINAL_WIDTH", "220")
    out = edgellm("finetune", "--plugin", "fwdllm", "--help", env={**os.environ, "COLUMNS": "220"}).stdout
    assert "Options of fwdllm" in out
    assert "(1..512; default 16)" in out
    assert "(>= 1 examples; default 8)" in out
    assert "(seeds, tensors; default seeds)" in out
    assert "--no-sampling" in out


def test_help_shows_the_options_of_the_device() -> None:
    wide = {**os.environ, "COLUMNS": "220", "TERMINAL_WIDTH": "220"}
    for words in (("--plugin", "fwdllm"), ()):
        out = edgellm("finetune", *words, "--device", "llama_cpp", "--help", env=wide).stdout
        assert "Options of llama_cpp" in out
        (line,) = [line for line in out.splitlines() if "--llama-cpp-contexts" in line]
        assert "(1..64; default 1)" in line
        assert "--no-llama-cpp-mmap" in out
    assert "--llama-cpp-contexts" not in edgellm("finetune", "--plugin", "fwdllm", "--help", env=wide).stdout


def test_plugins_info_says_how_a_device_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device llama_cpp, options as --llama-cpp-NAME" in told(capsys, "plugins", "info", "llama_cpp")[1]
    assert "in training" not in told(capsys, "plugins", "info", "gguf")[1]


def test_every_verb_is_on_the_first_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = told(capsys, "--help")[1]
    assert told(capsys)[1] == page
    for path in cli.VERBS:
        assert f"  {path.split()[0]} " in page
    for path in (path for path in cli.VERBS if " " in path and not path.startswith("help ")):
        assert f"  {path.split()[1]}" in told(capsys, path.split()[0], "--help")[1]


def test_exit_codes_match_the_errors(capsys: pytest.CaptureFixture[str]) -> None:
    from edgellm_sdk import errors

    listed = {row["code"] for row in json.loads(told(capsys, "help", "exit-codes", "--json")[1])}
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.EdgeLLMError)]
    assert {kind.exit_code for kind in kinds} | {0, 130, 143} == listed


def test_a_crash_leaves_a_file_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = "what the user typed"

    def fails(request: Any) -> Any:
        raise KeyError(message)

    monkeypatch.setitem(cli.VERBS, "doctor", cli.Verb("doctor", "x", fails))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = told(capsys, "doctor")
    assert (code, out, err.count("\n")) == (1, "", 1)
    (crash,) = tmp_path.iterdir()
    assert str(crash) in err
    assert "in fails" in crash.read_text()
    assert message not in err + crash.read_text()
    assert crash.stat().st_mode & 0o077 == 0


def test_verbose_adds_the_causes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = "import surely_missing"
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (tmp_path / "broken.py").write_text(text)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[edgellm.plugins]\nbroken = broken\n")
    done = edgellm("-v", "plugins", "info", "broken", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 4
    assert done.stderr.splitlines()[1].startswith("  because of ModuleNotFoundError")


def test_a_full_disk_behind_stdout(tmp_path: Path) -> None:
    for words in (("plugins", "list"), ("--version",), ("doctor", "--json"), ("--help",)):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([*EDGELLM, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 10, words
        assert done.stderr.count("\n") == 1
        assert "standard output" in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m edgellm_sdk.cli.main help exit-codes --json | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize(
    "name",
    ["a b.jsonl", "ünïcode-é.jsonl", "👩‍👩‍👧.jsonl", "שלום.jsonl", "-dash.jsonl", "--json.jsonl", "x" * 200 + ".jsonl"],
)
def test_odd_paths(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(ROWS)
    for environment in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = edgellm("data", "info", "--json", "--", name, cwd=tmp_path, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["examples"] == 20


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.jsonl"
    Path(os.fsdecode(raw)).write_text(ROWS)
    command = [part.encode() for part in EDGELLM] + [b"data", b"info", raw]
    for extra in ([], [b"--json"]):
        done = subprocess.run([*command, *extra], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    done = subprocess.run([*command[:-1], raw + b"x"], capture_output=True, check=False)
    assert done.returncode == 5
    assert b"Traceback" not in done.stderr


def test_dry_run_writes_nothing(
    tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("finetune", "-p", "fwdllm", "-m", str(tiny_llama), "-d", str(data), "-o", str(tmp_path / "out"))
    code, out, err = told(capsys, *words, "--dry-run", "--rank", "4", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["options"]["rank"] == 4
    assert report["metrics"] == {}
    assert not (tmp_path / "out").exists()


def test_options_of_the_device_as_typed_and_filed(
    tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line, a file and both: what counts is in the plan, the line wins over the file."""
    words = ("finetune", "-p", "fwdllm", "-m", str(tiny_llama), "-d", str(data), "-o", str(tmp_path / "out"))
    words = (*words, "--dry-run", "--json")
    file = tmp_path / "settings.toml"
    file.write_text('device = "llama_cpp"\n[options]\nrank = 4\n[options.llama_cpp]\ncontexts = 2\nthreads = 3\n')
    typed = ("--device", "llama_cpp", "--llama-cpp-contexts", "5", "--no-llama-cpp-mmap")
    for given, wanted, rank in (
        (typed, {"contexts": 5, "mmap": False}, 16),
        (("-c", str(file)), {"contexts": 2, "threads": 3}, 4),
        (("-c", str(file), *typed), {"contexts": 5, "threads": 3, "mmap": False}, 4),
    ):
        code, out, err = told(capsys, *words, *given)
        assert (code, err) == (0, "")
        report = json.loads(out)
        found = {name: value for name, value in report["config"].items() if name.startswith("llama_cpp_")}
        assert found == {f"llama_cpp_{name}": value for name, value in wanted.items()}
        assert report["options"]["rank"] == rank
    again = shlex.split(page.command(Report.from_json(report)))
    code, out, err = told(capsys, *again[1:], "-o", str(tmp_path / "out"), "--dry-run", "--json")
    assert (code, err) == (0, "") and json.loads(out)["config"] == report["config"]
    file.write_text("[options.llama_cpp]\ncontexts = 2\n")
    code, out, err = told(capsys, *words, "-c", str(file))
    assert (code, out) == (3, "") and "unknown option 'llama_cpp'" in err


def test_options_of_the_plugin_that_aggregates(
    tiny_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgellm_sdk import config, registry

    first = config.options(registry.get("fedavg").plugin.config)[0]
    words = ("finetune", "-p", "lora", "-m", str(tiny_llama), "-d", str(data), "-o", str(tmp_path / "out"))
    words = (*words, "--aggregate", "fedavg", "--dry-run", "--json")
    code, out, err = told(capsys, *words, f"--fedavg{first.flag[1:]}", str(first.default))
    assert (code, err) == (0, "")
    assert json.loads(out)["config"][f"fedavg_{first.name}"] == first.default
    code, _, err = told(capsys, *words, "--fedavg-nonsense", "1")
    assert code == 3 and "unknown option 'nonsense'" in err


def test_the_way_through_as_typed(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """finetune, compress, export: each finds what the one before it left."""
    short = ("--clients", "2", "--rounds", "2", "--layers", "1", "--batch-size", "4")
    done = edgellm(
        "finetune", "--plugin", "fwdllm", "--model", str(tiny_llama), "--data", str(data), *short,
        "--output", "runs/a", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "runs/a/report.json").read_text())
    again = ("finetune", "--plugin", "fwdllm", "--model", str(tiny_llama), "--data", str(data), *short)
    done = edgellm(*again, "--output", "runs/a", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (10, 1)
    assert "--resume" in done.stderr
    assert edgellm(*again, "--output", "runs/a", "--resume", cwd=tmp_path).returncode == 0
    done = edgellm("compress", "--plugin", "gptq", "--model", "runs/a", "--output", "runs/b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ("export", "--plugin", "gguf", "--model", "runs/b", "--output", "filter.gguf", "--no-gate")
    done = edgellm(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "filter.gguf" in done.stdout
    assert (tmp_path / "filter.gguf").is_file()
    assert str(tmp_path) not in (tmp_path / "runs/b/report.html").read_text()


@pytest.mark.llama
def test_deploy_answers_a_prompt(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    words = ("export", "--plugin", "gguf", "--model", str(tiny_llama), "--output", "f.gguf", "--no-gate")
    assert edgellm(*words, cwd=tmp_path).returncode == 0
    asked = ("deploy", "f.gguf", "--max-tokens", "4")
    given = edgellm(*asked, "--prompt", "hello", "--json", cwd=tmp_path)
    assert given.returncode == 0, given.stderr
    piped = edgellm(*asked, "--json", cwd=tmp_path, input="hello\n")
    assert json.loads(given.stdout)["text"] == json.loads(piped.stdout)["text"]
    chatted = edgellm(*asked, "chat", cwd=tmp_path, input="hello\n\n")
    assert chatted.returncode == 0, chatted.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_with_a_hint_and_the_run_resumes(
    number: int, code: int, tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    words = (
        "finetune", "--plugin", "fwdllm", "--model", str(tiny_llama), "--data", str(data), "--output", "run",
        "--rounds", "400", "--layers", "1", "--watch", "0",
    )  # fmt: skip
    process = subprocess.Popen([*EDGELLM, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    ledger = tmp_path / "run" / "ledger.jsonl"
    limit = time.monotonic() + 60
    while time.monotonic() < limit and not (ledger.exists() and ledger.stat().st_size > 300):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert err.count("\n") == 1
    assert "--resume" in err
    assert not list((tmp_path / "run").rglob(".*.tmp"))


@pytest.mark.parametrize("name", ["finetune", "compress", "export", "evaluate"])
def test_settings_are_the_arguments_of_the_python_function(name: str) -> None:
    import dataclasses
    import inspect

    from edgellm_sdk import settings, steps

    declared = {field.name: field.default for field in dataclasses.fields(getattr(settings, name.capitalize()))}
    parameters = inspect.signature(getattr(steps, name)).parameters
    wanted = {n: p.default for n, p in parameters.items() if n not in ("options", "quiet", "subject")}
    assert declared.keys() == wanted.keys()
    given = {n: value for n, value in wanted.items() if value is not inspect.Parameter.empty}
    assert {n: declared[n] for n in given} == given


def test_plain_tables_and_sizes() -> None:
    text = table(("name", "n"), [("a", 1), ("日本", None), ("b\x1b", 2.5)])
    assert (
        text.splitlines() == ["name    n", "-----  --", "a       1", "日本    -", "b\\x1b  2.5"] or "\x1b" not in text
    )
    assert [size(n) for n in (0, 999, 1000, 98_400_000, 2.5e9)] == ["0 B", "999 B", "1 kB", "98.4 MB", "2.5 GB"]


def test_comparison_is_a_table_over_the_evaluations() -> None:
    one = Report("eval", "cpu", config={"subject": "a"}, metrics={"accuracy": Metric(0.5, "", 10, (0.4, 0.6))})
    two = Report("eval", "llama_cpp", config={"subject": "b"}, metrics={"size": Metric(2e6, "bytes")})
    columns, rows = show.comparison([one, Report("export"), two])
    assert columns == ["measured", "on", "accuracy", "size"]
    assert rows == [["a", "cpu", "0.5 [0.4, 0.6]", "-"], ["b", "llama_cpp", "-", "2 MB"]]
