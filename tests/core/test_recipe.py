"""A recipe is refused whole, before anything runs; the command line, a file and Python say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgellm_sdk as edgellm
from edgellm_sdk.cli.main import main
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.steps.recipe import read


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_every_problem_of_every_step_at_once(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        """
        [[step]]
        verb = "finetune"
        plugin = "fwdllm"
        model = "smollm2-135m"
        data = "sms-spam"
        clients = 0
        options = { rnk = 4, layers = -1 }

        [[step]]
        verb = "compress"
        plugin = "gtpq"
        modle = "x"

        [[step]]
        verb = "evaluate"

        [[step]]
        verb = "eval"
        """,
    )
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert list(caught.value.problems) == [
        "step 1: clients: 0 is outside 1..100000",
        "step 1: unknown option 'rnk', did you mean 'rank'?",
        "step 1: layers: -1 is outside >= 0",
        "step 2: unknown key 'modle', did you mean 'model'?",
        "step 2: no plugin 'gtpq', did you mean 'gptq'?",
        "step 3: verb 'evaluate' is not one of finetune, compress, export, eval, did you mean 'eval'?",
        "step 4: needs data",
    ]


def test_three_ways_to_ask_one_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--plugin", "fwdllm", "--model", "smollm2-135m", "--data", "sms-spam", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="3"):
        main(["finetune", *common, "--quorum", "2"])
    typed = capsys.readouterr().err
    file = tmp_path / "settings.toml"
    file.write_text("quorum = 2\n")
    with pytest.raises(SystemExit, match="3"):
        main(["finetune", *common, "--config", str(file)])
    filed = capsys.readouterr().err
    with pytest.raises(ConfigError) as caught:
        edgellm.finetune("fwdllm", model="smollm2-135m", data="sms-spam", output=tmp_path / "run", quorum=2)
    path = recipe(tmp_path, '[[step]]\nverb="finetune"\nplugin="fwdllm"\nmodel="m"\ndata="d"\nquorum=2\n')
    with pytest.raises(ConfigError) as in_recipe:
        read(path)
    wanted = "quorum: 2 is outside 0.01..1"
    assert wanted in typed and wanted in filed
    assert caught.value.what == wanted
    assert in_recipe.value.problems == (f"step 1: {wanted}",)
    assert not (tmp_path / "run").exists()


def test_options_of_the_device_in_a_recipe_and_in_python(tmp_path: Path) -> None:
    step = '[[step]]\nverb="finetune"\nplugin="fwdllm"\nmodel="m"\ndata="d"\ndevice="llama_cpp"\n'
    (good,) = read(recipe(tmp_path, step + "options = { rank = 4, llama_cpp = { contexts = 2 } }\n"))
    assert good["options"] == {"rank": 4, "llama_cpp": {"contexts": 2}}
    bad = {"rnk": 4, "llama_cpp": {"contxts": 2, "threads": -1}}
    problems = (
        "unknown option 'rnk', did you mean 'rank'?",
        "unknown option 'contxts', did you mean 'contexts'?",
        "threads: -1 is outside 0..1024",
    )
    with pytest.raises(ConfigError) as caught:
        read(recipe(tmp_path, step + "options = { rnk = 4, llama_cpp = { contxts = 2, threads = -1 } }\n"))
    assert caught.value.problems == tuple(f"step 1: {problem}" for problem in problems)
    with pytest.raises(ConfigError) as caught:
        edgellm.finetune("fwdllm", "m", "sms-spam", tmp_path / "run", device="llama_cpp", options=bad)
    assert caught.value.problems == problems and caught.value.exit_code == 3
    for options, words in (("{ llama_cpp = 3 }", "options.llama_cpp: is not a table"),
                           ("{ executorch = { queries = 2 } }", "unknown option 'executorch'")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            read(recipe(tmp_path, step + f"options = {options}\n"))
    with pytest.raises(ConfigError, match="no method can train on 'gguf'"):
        read(recipe(tmp_path, step.replace("llama_cpp", "gguf")))
    assert not (tmp_path / "run").exists()
