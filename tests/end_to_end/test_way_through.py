"""The whole way, as a user types it: personalise, compress, export with the gate, run; in Python and as a recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgellm_sdk as edgellm
from edgellm_sdk import gguf_file, models, store
from edgellm_sdk.errors import ConfigError, GateError, StorageError
from edgellm_sdk.gate import GateResult

pytest.importorskip("llama_cpp")
OPTIONS = ["--layers", "1", "--precision", "float32", "--max-length", "96", "--perturbations", "2"]


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgellm_sdk.cli.main", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("way through")
    rows = [
        {"prompt": f"Is '{text} {i}' spam?", "completion": answer}
        for i in range(12)
        for text, answer in (("win a prize", "yes"), ("see you tonight", "no"))
    ]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def typed(folder: Path, tiny_llama: Path) -> Path:
    """The four commands of the README, on a file that is not part of the project."""
    model = str(tiny_llama)
    commands = [
        ["finetune", "--plugin", "fwdllm", "--model", model, "--data", "my.jsonl", "--clients", "4", "--rounds", "3",
         "--output", "runs/a", *OPTIONS],
        ["compress", "--plugin", "gptq", "--model", "runs/a", "--output", "runs/b", "--calibration-length", "32",
         "--calibration-samples", "4"],
        ["export", "--plugin", "gguf", "--model", "runs/b", "--output", "filter.gguf"],
        ["deploy", "filter.gguf", "--prompt", "Is 'win a prize' spam?", "--max-tokens", "5"],
    ]  # fmt: skip
    for command in commands:
        done = run(*command, cwd=folder)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
    return folder


def test_every_step_left_a_report_and_a_page(typed: Path) -> None:
    for place in ("runs/a", "runs/b", "filter.report"):
        report = json.loads((typed / place / "report.json").read_text())
        assert report["wall_seconds"] > 0
        page = (typed / place / "report.html").read_text()
        assert "<svg" in page or place != "runs/a"
        assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert (typed / "filter.Modelfile").is_file()


def test_the_file_holds_the_quantisers_blocks_and_passed_the_gate(typed: Path) -> None:
    verified = json.loads((typed / "filter.report" / "report.json").read_text())["verified"]
    assert verified["passed"] and len(verified["checks"]) >= 5
    found = gguf_file.read(typed / "filter.gguf")
    kinds = {info.type for name, info in found.tensors.items() if ".attn_" in name and "norm" not in name}
    assert {str(kind).lower() for kind in kinds} == {"q4_0"}
    packed, _ = store.load_arrays(typed / "runs/b/model/quantized.safetensors")
    down = packed["model.layers.0.mlp.down_proj.weight"]
    assert (found.tensor_bytes("blk.0.ffn_down.weight") == down).all()


def test_bytes_of_every_client_are_in_the_report(typed: Path) -> None:
    report = json.loads((typed / "runs/a/report.json").read_text())
    assert len(report["bytes"]) == 4
    for totals in report["bytes"].values():
        assert totals["up_payload"] == 3 * 2 * 8  # rounds x perturbations x (jvp, loss)
        assert totals["up"] > totals["up_payload"] and totals["down"] > totals["down_payload"] > 0


def test_a_finished_run_is_not_overwritten_and_resume_returns_it(typed: Path, tiny_llama: Path) -> None:
    words = ["finetune", "--plugin", "fwdllm", "--model", str(tiny_llama), "--data", "my.jsonl", "--clients", "4",
             "--rounds", "3", "--output", "runs/a", *OPTIONS]  # fmt: skip
    before = (typed / "runs/a/model/adapter_model.safetensors").read_bytes()
    again = run(*words, cwd=typed)
    assert again.returncode == 10 and "--resume" in again.stderr
    assert run(*words, "--resume", cwd=typed).returncode == 0
    other = run(*words, "--seed", "9", "--resume", cwd=typed)
    assert other.returncode == 3 and "seed" in other.stderr
    assert (typed / "runs/a/model/adapter_model.safetensors").read_bytes() == before
    export = run("export", "--plugin", "gguf", "--model", "runs/b", "--output", "filter.gguf", cwd=typed)
    assert export.returncode == 10 and "filter.gguf" in export.stderr


def test_the_python_api_gives_the_same_objects(typed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    options = {"layers": 1, "precision": "float32", "max_length": 96, "perturbations": 2}
    tuned = edgellm.finetune(
        "fwdllm", str(tiny_llama), str(typed / "my.jsonl"), tmp_path / "a", clients=4, rounds=3, options=options
    )
    assert tuned.model is not None and tuned.model.adapters and tuned.report.verb == "finetune"
    same = (tmp_path / "a/model/adapter_model.safetensors").read_bytes()
    assert same == (typed / "runs/a/model/adapter_model.safetensors").read_bytes()
    with edgellm.deploy(str(tmp_path / "a")) as session:
        ids = session.prompt_ids(({"role": "user", "content": "hello"},))
        assert len(session.generate(ids, 4).tokens) <= 4
    measured = edgellm.evaluate(str(typed / "filter.gguf"), str(typed / "my.jsonl"))
    assert measured.report.metrics["loss"].value > 0
    assert models.resolve(str(tmp_path / "a")).digest == tuned.model.digest


def test_a_drifting_file_is_kept_aside(typed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GateResult, "passed", property(lambda self: False))
    with pytest.raises(GateError) as caught:
        edgellm.export("gguf", str(typed / "runs/b"), typed / "other.gguf")
    assert caught.value.exit_code == 6 and not (typed / "other.gguf").exists()
    assert (typed / "other.rejected.gguf").is_file()


def test_a_recipe_is_checked_whole_before_it_runs(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'sede = 1\n[[step]]\nverb = "finetun"\n[[step]]\nverb = "compress"\nplugin = "gptq"\nmodle = "x"\n'
        '[[step]]\nverb = "eval"\nsubject = "@nobody"\ndata = 3\n'
    )
    with pytest.raises(ConfigError) as caught:
        edgellm.run(recipe, tmp_path / "out")
    text = "; ".join(caught.value.problems)
    for part in (
        "'sede'",
        "'finetun'",
        "did you mean 'finetune'",
        "'modle'",
        "did you mean 'model'",
        "@nobody",
        "data",
    ):
        assert part in text
    assert not (tmp_path / "out").exists()


def test_a_recipe_runs_and_resumes(typed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[[step]]\nverb = "finetune"\nplugin = "fwdllm"\nmodel = "{tiny_llama}"\ndata = "{typed / "my.jsonl"}"\n'
        'rounds = 2\noptions = { layers = 1, precision = "float32" }\n'
        f'[[step]]\nname = "measured"\nverb = "eval"\ndata = "{typed / "my.jsonl"}"\nlimit = 8\n'
        '[[step]]\nname = "file"\nverb = "export"\nplugin = "gguf"\noptions = { type = "f32" }\n'
    )
    first = edgellm.run(recipe, tmp_path / "out")
    assert [outcome.report.verb for outcome in first] == ["finetune", "eval", "export"]
    assert (tmp_path / "out/file.gguf").is_file() and (tmp_path / "out/report.html").is_file()
    with pytest.raises(StorageError):
        edgellm.run(recipe, tmp_path / "out")
    again = edgellm.run(recipe, tmp_path / "out", resume=True)
    assert [o.report.started for o in again] == [o.report.started for o in first]


def test_adapters_carried_by_hand_are_averaged(typed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        edgellm.finetune(
            "fwdllm", str(tiny_llama), str(typed / "my.jsonl"), tmp_path / str(seed), rounds=2, seed=seed,
            options={"layers": 1, "precision": "float32", "train": "norm"},
        )  # fmt: skip
    done = run("aggregate", "--plugin", "fedavg", str(tmp_path / "1"), str(tmp_path / "2"), "-o", str(tmp_path / "m"),
               cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = "model/adapter_model.safetensors"
    one, two, mean = (store.load_arrays(tmp_path / part / name)[0] for part in ("1", "2", "m"))
    for key, value in mean.items():
        assert value == pytest.approx((one[key].astype(float) + two[key]) / 2, abs=1e-6)
    assert models.resolve(str(tmp_path / "m")).adapters
