"""Examples as tokens: where the loss starts, how a turn ends, what is cut when there is too much."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgellm_sdk import data
from edgellm_sdk.errors import DataError
from edgellm_sdk.kit import prompts
from edgellm_sdk.kit.loading import load_tokenizer
from edgellm_sdk.models import resolve
from edgellm_sdk.types import Example, ModelHandle


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(resolve(str(tiny_llama)))


@pytest.fixture
def plain(tiny_llama: Path) -> Any:
    """The same tokenizer without a chat template."""
    found = load_tokenizer(resolve(str(tiny_llama)))
    found.chat_template = None
    return found


def chat(text: str, answer: str) -> Example:
    return Example(({"role": "user", "content": text},), answer)


def test_chat(tokenizer: Any) -> None:
    (row,) = prompts.encode(tokenizer, [chat("a message", "ham")], 100)
    assert tokenizer.decode(row.tokens[: row.start]) == "<|im_start|>user\na message<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.tokens[row.start :]) == "ham<|im_end|>"
    assert (row.index, row.cut) == (0, False)
    assert list(row.tokens[: row.start]) == prompts.prompt_ids(tokenizer, chat("a message", "").prompt)


def test_the_training_prompt_is_a_prefix_of_the_whole_conversation(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "x y"}, {"role": "assistant", "content": "ham"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    (row,) = prompts.encode(tokenizer, [chat("x y", "ham")], 100)
    assert whole.startswith(tokenizer.decode(row.tokens)) and whole[len(tokenizer.decode(row.tokens)) :] == "\n"


def test_text(tokenizer: Any) -> None:
    (row,) = prompts.encode(tokenizer, [Example("", "the quick brown fox")], 100)
    assert row.start == 1 and tokenizer.decode(row.tokens) == "the quick brown fox<|im_end|>"
    (cut,) = prompts.encode(tokenizer, [Example("", "the quick brown fox " * 50)], 20)
    assert len(cut.tokens) == 20 and cut.cut


def test_plain_prompts_are_not_put_into_a_template(tokenizer: Any) -> None:
    (row,) = prompts.encode(tokenizer, [Example("hello ", "world")], 100)
    assert tokenizer.decode(row.tokens[: row.start]) == "hello "
    assert tokenizer.decode(row.tokens[row.start :]) == "world<|im_end|>"


def test_without_a_template(plain: Any) -> None:
    (row,) = prompts.encode(plain, [chat("a message", "ham")], 100)
    assert plain.decode(row.tokens[: row.start]) == "a message\n"
    assert plain.decode(row.tokens[row.start :]) == "ham<|im_end|>"


@pytest.mark.parametrize("length", [24, 30, 40])
def test_too_long_keeps_the_completion_and_the_end_of_the_message(tokenizer: Any, length: int) -> None:
    text = " ".join(str(k) for k in range(200)) + " the end"
    (row,) = prompts.encode(tokenizer, [chat(text, "ham")], length)
    shown = tokenizer.decode(row.tokens)
    assert len(row.tokens) <= length and row.cut
    assert shown.startswith("<|im_start|>user\n") and shown.endswith(
        "d<|im_end|>\n<|im_start|>assistant\nham<|im_end|>"
    )
    assert len(row.tokens) >= length - 3  # no more is cut than must be
    assert "1 of 1" in prompts.cut_note([row], length)


def test_far_too_long(tokenizer: Any) -> None:
    (row,) = prompts.encode(tokenizer, [chat("a b c", "ham " * 50)], 6)
    assert len(row.tokens) == 6 and row.start == 1 and row.cut
    with pytest.raises(DataError, match="nothing to predict"):
        prompts.encode(tokenizer, [chat("a", "b")], 1)
    system = Example(({"role": "system", "content": "word " * 99}, {"role": "user", "content": "hi"}), "ham")
    (row,) = prompts.encode(tokenizer, [system], 16)
    assert len(row.tokens) <= 16 and tokenizer.decode(row.tokens[row.start :]) == "ham<|im_end|>"
    assert not prompts.cut_note(prompts.encode(tokenizer, [chat("a", "b")], 90), 90)


def test_special_tokens_of_the_template_are_single_ids(tokenizer: Any) -> None:
    ids = prompts.prompt_ids(tokenizer, chat("x", "").prompt)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>") and ids.count(tokenizer.eos_token_id) == 1


def test_stop_ids(tokenizer: Any, plain: Any) -> None:
    assert prompts.stop_ids(tokenizer) == prompts.stop_ids(plain) == (2,)
    assert prompts.stop_ids(tokenizer, SimpleNamespace(eos_token_id=[0, 2])) == (0, 2)
    assert prompts.stop_ids(tokenizer, {"eos_token_id": 7}) == (2, 7)


def test_template_that_ends_turns_with_another_token(tokenizer: Any, plain: Any) -> None:
    plain.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert prompts.stop_ids(plain) == (0, 2)
    (row,) = prompts.encode(plain, [chat("x", "ham")], 50)
    assert plain.decode(row.tokens) == "user: x<|endoftext|>assistant: ham<|endoftext|>"


def test_template_that_rewrites_answers_falls_back_to_eos(plain: Any) -> None:
    plain.chat_template = "{% for m in messages %}{{ m.content|upper }}{% endfor %}"
    (row,) = prompts.encode(plain, [chat("x", "ham")], 50)
    assert plain.decode(row.tokens) == "Xham<|im_end|>"


@pytest.mark.model
def test_sms_spam_on_smollm2(smollm2: ModelHandle) -> None:
    tokenizer = load_tokenizer(smollm2)
    examples = data.read("sms-spam", "valid").examples
    rows = prompts.encode(tokenizer, examples, 128)
    assert len(rows) == len(examples) and all(len(row.tokens) <= 128 for row in rows)
    ends = {tokenizer.decode(row.tokens[row.start :]) for row in rows}
    assert ends == {"No<|im_end|>", "Yes<|im_end|>"}
    assert {len(row.tokens) - row.start for row in rows} == {2}
