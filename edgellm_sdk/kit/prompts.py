"""From examples to token ids.

The prompt and the completion are tokenised apart and joined, so the boundary between them is a token boundary on every
machine and the loss starts exactly at the completion. A chat prompt is rendered with the assistant header open, as at
inference, and its completion is followed by what the template puts after an assistant turn, up to and including the
first token that ends a generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from edgellm_sdk.errors import DataError, ModelError
from edgellm_sdk.templates import Renderer
from edgellm_sdk.types import Example, Message, Prompt

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE = ({"role": "user", "content": "a"},)
_REPLY = "b"


@dataclass(frozen=True)
class Encoded:
    """Token ids of example `index`; the loss falls on predicting `tokens[start:]`. `cut`: something was left out."""

    tokens: tuple[int, ...]
    start: int
    index: int
    cut: bool = False

    @property
    def scored(self) -> range:
        """Places of the tokens that are to be predicted; nothing comes before the first."""
        return range(max(self.start, 1), len(self.tokens))


@lru_cache(maxsize=8)
def _renderer(template: str, special: tuple[tuple[str, str], ...]) -> Renderer:
    return Renderer(template, dict(special))


def renderer(tokenizer: Any) -> Renderer | None:
    """The renderer of a tokenizer's chat template, shared within the process; None when it has no template."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not isinstance(template, str) or not template:
        return None
    special = {name: getattr(tokenizer, name, None) for name in _SPECIAL}
    return _renderer(template, tuple((name, str(value)) for name, value in special.items() if value is not None))


def prompt_text(tokenizer: Any, prompt: Prompt) -> str:
    """The text that is tokenised for `prompt`: messages through the chat template with the assistant header open (or,
    without a template, their contents on lines of their own); plain text as it is."""
    if isinstance(prompt, str):
        return prompt
    chat = renderer(tokenizer)
    if chat is not None:
        return chat.render(prompt)
    return "".join(f"{message['content']}\n" for message in prompt)


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of `prompt_text`. A chat template writes its own special tokens; plain text gets the tokenizer's."""
    plain = isinstance(prompt, str) or renderer(tokenizer) is None
    return _ids(tokenizer, prompt_text(tokenizer, prompt), special=plain)


def _ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    ids = list(tokenizer.encode(text, add_special_tokens=special))
    # Some tokenizers also close a text with eos, which is for us to do, and only where the completion ends.
    if special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    return [int(i) for i in ids]


def stop_ids(tokenizer: Any, config: Any = None) -> tuple[int, ...]:
    """Ids that end a generation, ascending: the tokenizer's eos, those of `config` (a model or generation config, an
    object or a mapping), and the token that the chat template closes an assistant turn with."""
    found = {tokenizer.eos_token_id}
    value = config.get("eos_token_id") if isinstance(config, Mapping) else getattr(config, "eos_token_id", None)
    found |= set(value) if isinstance(value, (list, tuple)) else {value}
    tail = _template_tail(tokenizer)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    found |= set([i for i in _ids(tokenizer, tail) if i in special][:1])
    return tuple(sorted(int(i) for i in found if i is not None))


def _template_tail(tokenizer: Any) -> str:
    """What the chat template writes after an assistant turn; empty without a template, or when it rewrites turns."""
    chat = renderer(tokenizer)
    if chat is None:
        return ""
    try:
        opened = chat.render(_PROBE)
        whole = chat.render((*_PROBE, {"role": "assistant", "content": _REPLY}), add_generation_prompt=False)
    except ModelError:
        return ""
    head, found, tail = whole[len(opened) :].partition(_REPLY)
    return tail if whole.startswith(opened) and found and not head else ""


def ending(tokenizer: Any, chat: bool) -> list[int]:
    """The ids after a completion: for chat, the template's own up to the first stop id; else eos, if there is one."""
    stops = set(stop_ids(tokenizer))
    if chat:
        tail = _ids(tokenizer, _template_tail(tokenizer))
        place = next((k for k, token in enumerate(tail) if token in stops), None)
        if place is not None:
            return tail[: place + 1]
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """One Encoded, of at most `max_length` tokens, for each example, in order.

    What is too long loses the beginning of the last user message (the completion is kept whole), then further prompt
    tokens on the left, and only when the completion alone does not fit its end. Each such row has `cut` set; see
    `cut_note`. With an empty prompt the loss falls on everything but the first token, which nothing predicts.
    DataError when nothing is left to predict.
    """
    if max_length < 2:
        raise DataError(f"max length {max_length} leaves nothing to predict", fix="use 2 or more")
    endings = {chat: ending(tokenizer, chat) for chat in (False, True)}
    with_template = renderer(tokenizer) is not None
    made = []
    for index, example in enumerate(examples):
        after = endings[with_template and not isinstance(example.prompt, str)]
        if not example.prompt:
            tokens = _ids(tokenizer, example.completion, special=True) + after
            start, cut = 1, len(tokens) > max_length
            tokens = tokens[:max_length]
        else:
            answer = _ids(tokenizer, example.completion) + after
            room = max_length - len(answer)
            before = prompt_ids(tokenizer, example.prompt)
            cut = len(before) > room
            if cut:
                before = _shorten(tokenizer, example.prompt, max(1, room))
                answer = answer[: max_length - len(before)]
            tokens, start = before + answer, len(before)
        if len(tokens) <= start:
            raise DataError(f"example {index + 1} has nothing to predict", fix="give it a longer completion")
        made.append(Encoded(tuple(tokens), start, index, cut))
    return made


def _shorten(tokenizer: Any, prompt: Prompt, room: int) -> list[int]:
    """The prompt's ids with as little as possible of the last user message cut on its left, so that `room` is kept."""
    last = -1
    if not isinstance(prompt, str):
        last = max((k for k, message in enumerate(prompt) if message["role"] == "user"), default=-1)
    if isinstance(prompt, str) or last < 0:
        return prompt_ids(tokenizer, prompt)[-room:]
    turns = tuple(prompt)

    def ids(dropped: int) -> list[int]:
        message: Message = {**turns[last], "content": turns[last]["content"][dropped:]}
        return prompt_ids(tokenizer, (*turns[:last], message, *turns[last + 1 :]))

    low, high = 0, len(turns[last]["content"])
    while low < high:
        middle = (low + high) // 2
        if len(ids(middle)) <= room:
            high = middle
        else:
            low = middle + 1
    return ids(low)[-room:]


def cut_note(encoded: Sequence[Encoded], max_length: int) -> str:
    """A line for the report when examples were shortened, else nothing."""
    count = sum(row.cut for row in encoded)
    return f"{count} of {len(encoded)} examples were shortened to {max_length} tokens" if count else ""
