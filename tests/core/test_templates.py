"""Chat templates: equal to transformers' rendering, and harmless whatever they hold."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from edgellm_sdk.errors import ModelError
from edgellm_sdk.templates import Renderer
from edgellm_sdk.types import ModelHandle

HI = ({"role": "user", "content": "hi"},)

HOSTILE = {
    # the shape of CVE-2024-34359: walk from any object to os and run a command
    "CVE-2024-34359": "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
    "{{ x()._module.__builtins__['__import__']('os').popen('touch CANARY').read() }}{% endif %}{% endfor %}",
    "cycler globals": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "joiner globals": "{{ joiner.__init__.__globals__.os.system('touch CANARY') }}",
    "namespace globals": "{{ namespace.__init__.__globals__.os.system('touch CANARY') }}",
    "lipsum globals": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "self._TemplateReference__context": "{{ self._TemplateReference__context.environment }}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter spelt": "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') or 1/0 }}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) or 1/0 }}",
    "format by map": "{{ (['{0.__class__.__mro__}']|map('format', raise_exception)|list)[0].x.y }}",
    "function code": "{{ strftime_now.__code__.co_consts }}",
    "generator frame": "{% set g = messages|map('upper') %}{{ g.gi_frame.f_back.f_globals }}",
    "mutate": "{% set _ = messages.append({'role': 'x'}) %}{{ messages }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "extends": "{% extends '/etc/passwd' %}",
    "infinite loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "range too long": "{% for i in range(10**9) %}x{% endfor %}",
    "10^9 characters": "{{ 'a' * 10**9 }}",
    "10^9 in pieces": "{% for i in range(99999) %}{{ 'a' * 10**4 }}{% endfor %}",
    "10^10 by doubling": "{% set n = namespace(s='ab') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}"
    "{{ n.s }}",
    "power": "{{ 9**(9**9) }}",
    "padding": "{{ '%999999999999d' % 1 }}",
    "padding by center": "{{ 'a'|center(10**10) }}",
    "big list": "{{ ([1] * 10**10)|length }}",
    "deep list": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "unfinished": "{% if %}",
    "division": "{{ 1 / 0 }}",
    "raise_exception": "{{ raise_exception('\x1b[2J no \n system role') }}",
    "too large": "a" * (300 << 10),
}


# Attribute climbs that the sandbox answers with nothing, so the template goes on without what it wanted.
INERT = {
    "{{ ''|attr('__class__')|attr('__mro__') }}": "",
    "{{ [raise_exception]|map(attribute='__globals__')|list }}": "[Undefined]",
    "{{ '{x.__globals__}'.format_map({'x': raise_exception}) }}": "",
    "{% set f = '{0.__globals__}'|attr('format') %}{{ f(raise_exception) }}": "",
    "{{ raise_exception.__globals__ }}": "",
    "{{ messages.__class__ }}": "",
    "{{ messages[0].__init__ }}": "",
}


@pytest.mark.row("F6")
@pytest.mark.parametrize("template", INERT)
def test_inert(template: str) -> None:
    with Renderer(template, {}) as renderer:
        assert renderer.render(HI) == INERT[template]


@pytest.mark.row("F6")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(tmp_path: Path, kind: str) -> None:
    canary, start = tmp_path / "canary", time.monotonic()
    child = None
    with pytest.raises(ModelError) as caught, Renderer(HOSTILE[kind].replace("CANARY", str(canary)), {}) as renderer:
        try:
            renderer.render(HI)
        finally:
            child = renderer._child
    text = str(caught.value)
    assert text.isprintable() and len(text) <= 250 and caught.value.exit_code == 6
    assert not canary.exists()
    assert time.monotonic() - start < 6  # a second of processor time; more on the clock of a busy machine
    assert child is None or child.poll() is not None


def test_the_child_cannot_open_files_even_outside_the_sandbox(tmp_path: Path) -> None:
    """The limits alone, on the real child: no descriptor left, no file growth, no core, bounded memory."""
    with Renderer("{{ messages[0].content }}", {}) as renderer:
        assert renderer.render(HI) == "hi"
        child = renderer._child
        assert child is not None
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        for name, value in [("Max open files", "0"), ("Max file size", "0"), ("Max core file size", "0")]:
            row = next(line for line in limits.splitlines() if line.startswith(name))
            assert row[len(name) :].split()[:2] == [value, value]
        row = next(line for line in limits.splitlines() if line.startswith("Max address space"))
        assert row.split()[3] == str(512 << 20)
        assert b"TOKEN" not in Path(f"/proc/{child.pid}/environ").read_bytes()


def test_after_a_failure_the_next_render_works() -> None:
    loop = "{% if messages|length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with Renderer(loop + "{% endif %}fine", {}) as renderer:
        assert renderer.render(HI) == "fine"
        first = renderer._child
        with pytest.raises(ModelError, match="processor time"):
            renderer.render(HI + HI)
        assert renderer.render(HI) == "fine"
        assert first is not None and first.poll() is not None


def test_one_child_serves_many_renders_and_threads() -> None:
    with Renderer("{{ messages[0].content }}", {}) as renderer:
        results: dict[int, list[str]] = {}

        def work(k: int) -> None:
            results[k] = [renderer.render(({"role": "user", "content": f"{k}-{n}"},)) for n in range(50)]

        renderer.render(HI)
        child = renderer._child
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {k: [f"{k}-{n}" for n in range(50)] for k in range(4)}
        assert renderer._child is child


def test_a_forked_process_has_its_own_child() -> None:
    with Renderer("{{ messages[0].content }}", {}) as renderer:
        renderer.render(HI)
        pid = os.fork()
        if pid == 0:
            fine = renderer.render(({"role": "user", "content": "fork"},)) == "fork"
            renderer.close()
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert renderer.render(HI) == "hi"


TEMPLATES = {
    "trim": "{%- for m in messages %}\n    {%- if m.role == 'user' %}\nU: {{ m.content | trim }}\n    {%- else %}\n"
    "  A: {{ m['content'] }}{{ eos_token }}\n    {%- endif %}\n{%- endfor %}\n"
    "{% if add_generation_prompt %}\nA:{% endif %}",
    "loopcontrols": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index0 }}"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ '<&>\\u00e9' | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{{ loop.index }}{% endgeneration %}"
    "{% endfor %}",
    "namespace": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{% endfor %}{{ n.k }}",
    "tools": "{% if tools %}T{% endif %}{% if tools is none and documents is none %}none{% endif %}"
    "{{ 'x' if custom is defined else 'y' }}{{ bos_token }}",
    "reversed": "{% for m in messages[::-1] %}{{ m.content.split('\\n')[-1].strip('!') }}{% endfor %}",
    "macro": "{% macro show(m) %}[{{ m.role }}: {{ m.content }}]{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{% endfor %}",
}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": " a\nb!\n"},
        {"role": "assistant", "content": "c "},
    ],
    [{"role": "user", "content": "<b>é你🙂\u2028</b> {{ 7*7 }} {% raw %}"}, {"role": "assistant", "content": ""}],
]


@pytest.mark.parametrize("kind", [*TEMPLATES, "chatml"])
def test_equal_to_transformers(tiny_llama: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    if kind in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[kind]
    with Renderer(tokenizer.chat_template, tokenizer.special_tokens_map) as renderer:
        for messages in CONVERSATIONS:
            for header in (False, True):
                theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
                assert renderer.render(messages, header) == theirs


@pytest.mark.model
def test_equal_to_transformers_on_smollm2(smollm2: ModelHandle) -> None:
    from edgellm_sdk.kit.loading import load_tokenizer
    from edgellm_sdk.kit.prompts import prompt_text

    tokenizer, draw = load_tokenizer(smollm2), random.Random(3)
    pieces = ("", "hi", " é\n", "<|im_end|>", "你好 🙂", "{{ 7*7 }}", "'re\t12", "\u2028 ", "a" * 300)
    drawn = [
        [
            {"role": draw.choice(("system", "user", "assistant")), "content": "".join(draw.choices(pieces, k=turns))}
            for turns in range(draw.randrange(1, 6))
        ]
        for _ in range(200)
    ]
    for messages in (*CONVERSATIONS, *drawn):
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt_text(tokenizer, tuple(messages)) == theirs
