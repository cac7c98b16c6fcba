"""Tiny seeded models of every architecture that can be exported, with a tokenizer, as HF folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = (
    "the quick brown fox jumps over the lazy dog", "win a free prize now, call this number today",
    "are you coming home for dinner tonight, mum asks", "classify the message as ham or spam, in one word",
    "a small model learns on a small device from private messages", "don't you'll we've I'm they'RE 12 345 2026",
)  # fmt: skip
VOCABULARY = 384
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.08,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3", _GEMMA | {"num_hidden_layers": 7}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 512}),
}
# What the published models of the kind have besides, where it changes what the file must say.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama llama3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "llama yarn": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}}),
    "mistral tied": ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 16.0, "beta_slow": 2.0}}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}}),
    "gemma3 linear": ("gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "phi3 partial": ("phi3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    "phi3 tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3 long": ("phi3", {"original_max_position_embeddings": 128, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128,
        "short_factor": [1.0, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0],
        "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]}}),
}  # fmt: skip


def write_kind(folder: Path, kind: str, seed: int = 0, sharp: bool = False, **changes: Any) -> Path:
    """A model of `kind` (of KINDS or VARIANTS) with random weights, norms and biases away from their usual values, and
    a byte-level BPE tokenizer. `sharp`: logits with structure, so that a small fault moves the distribution."""
    import torch
    import transformers

    kind, more = VARIANTS.get(kind, (kind, {}))
    name, own = KINDS[kind]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**(_COMMON | own | more | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("norm.weight", "bias")):  # ones and zeros hide what is forgotten or swapped
                weight.add_(0.2 * torch.randn_like(weight))
            elif sharp and key.endswith(("embed_tokens.weight", "lm_head.weight")):
                weight.mul_(4 if not config.tie_word_embeddings or key.startswith("lm_head") else 3)
            elif sharp and ("q_proj" in key or "k_proj" in key or "qkv_proj" in key):
                weight.mul_(3)
    model.save_pretrained(folder)
    write_bpe(folder)
    return folder


def with_sentencepiece(folder: Path, kind: str, style: str, model_file: bool = True, **changes: Any) -> Path:
    """A model of `kind` whose tokenizer is one of `write_sentencepiece`."""
    size = write_sentencepiece(folder, style, model_file)
    settings = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    write_kind(folder, kind, vocab_size=size + 3, **changes)
    for name, raw in settings.items():
        (folder / name).write_bytes(raw)
    return folder


def write_bpe(folder: Path, cut: Any = None, normalizer: Any = None, whole_words: bool = False) -> None:
    """A byte-level BPE tokenizer learned on a few sentences; `cut` a pre-tokenizer, one digit at a time when None."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = cut or pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(list(CORPUS) * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        pad_token="<|im_end|>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def _message(number: int, wire: int, raw: bytes) -> bytes:
    """One field of a protocol buffer: `raw` behind its key, and its length for bytes."""

    def varint(value: int) -> bytes:
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    return varint(number << 3 | wire) + (varint(len(raw)) if wire == 2 else b"") + raw


def sentencepiece_model(pieces: list[tuple[str, float, int]], kind: int, prefix: bool) -> bytes:
    """A `tokenizer.model` with these (text, score, type); `kind` 1 unigram, 2 BPE; `prefix`: a space before a text."""
    raw = b""
    for text, score, which in pieces:
        body = _message(1, 2, text.encode()) + _message(2, 5, np.float32(score).tobytes())
        raw += _message(1, 2, body + _message(3, 0, bytes([which])))
    raw += _message(2, 2, _message(3, 0, bytes([kind])) + _message(35, 0, b"\x01"))
    identity = _message(1, 2, b"identity") + _message(3, 0, bytes([prefix])) + _message(4, 0, b"\0")
    return raw + _message(3, 2, identity + _message(5, 0, b"\x01"))


def write_sentencepiece(folder: Path, kind: str, model_file: bool = True, pieces: int = 160) -> int:
    """A SentencePiece tokenizer as Llama 2 (`llama`, a space before every text), Gemma (`gemma`, none) or T5
    (`unigram`) has it; returns the number of tokens. Two added tokens, one special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    mark, specials = "\u2581", ["<unk>", "<s>", "</s>"]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=mark)
    trainer = trainers.BpeTrainer(vocab_size=40 + pieces, show_progress=False)
    learner.train_from_iterator(list(CORPUS) * 4, trainer)
    learned = json.loads(learner.to_str())["model"]
    merged = ["".join(pair) for pair in learned["merges"]] + ([] if kind == "unigram" else [mark * 2, mark * 4])
    letters = [text for text in learned["vocab"] if len(text) == 1]
    texts = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    rank = {text: place for place, text in enumerate(merged)}
    known = set(texts)
    pairs = [(a, b) for text in merged for a, b in ((text[:i], text[i:]) for i in range(1, len(text)))
             if a in known and b in known]  # fmt: skip
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))]
    if kind == "unigram":
        scores = (
            [0.0] * 259 + [-2.0 - 0.01 * i for i in range(len(merged))] + [-8.0 - 0.01 * i for i in range(len(letters))]
        )
        tokenizer = Tokenizer(models.Unigram(list(zip(texts, scores, strict=True)), unk_id=0, byte_fallback=False))
    else:
        vocabulary = {text: i for i, text in enumerate(texts)}
        pairs.sort(key=lambda pair: rank[pair[0] + pair[1]])
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [] if kind == "gemma" else [normalizers.Prepend(mark)]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", mark)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = "{% for m in messages %}{{ '<tool>' + m['content'] + '<|end|>' }}{% endfor %}"
    fast.save_pretrained(folder)
    if model_file:
        kinds = [2, 3, 3, *[6] * 256, *[1] * (len(texts) - 259)]
        rows = list(zip(texts, scores, kinds, strict=True))
        raw = sentencepiece_model(rows, 1 if kind == "unigram" else 2, kind != "gemma")
        (folder / "tokenizer.model").write_bytes(raw)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        settings["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(texts) + 2


def torch_logits(folder: Path, ids: list[int]) -> Any:
    """(len(ids), vocabulary) float64 logits of transformers in float32."""
    import torch
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def engine_logits(path: Path, ids: list[int], adapter: Path | None = None, scale: float = 1.0, room: int = 8) -> Any:
    """The same from llama.cpp with a float32 cache and `room` tokens more context than `ids`."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=len(ids) + room, n_batch=512, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False,
        lora_path=str(adapter) if adapter else None, lora_scale=scale,
    )  # fmt: skip
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)], np.float64)
    finally:
        model.close()


def compare(reference: Any, got: Any) -> tuple[float, float]:
    """(top-1 agreement, mean KL in nats) over positions."""
    p = reference - np.logaddexp.reduce(reference, axis=1, keepdims=True)
    q = got - np.logaddexp.reduce(got, axis=1, keepdims=True)
    return float((p.argmax(1) == q.argmax(1)).mean()), float((np.exp(p) * (p - q)).sum(1).mean())
