"""The process in which chat templates run. A template is code from a model file, so it gets nothing to steal or break.

Run as a file with `python -I -S`, never imported by the SDK: it knows the standard library and jinja2 only, whose
folders come as arguments. Once ready it can open no file or socket, cannot grow past its memory limit, and a render
that takes more than its share of processor time ends it. Requests and answers are JSON, each after its 4-byte length.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import Any

MEMORY = 512 << 20
MAX_OUTPUT = 1 << 20
SECONDS = 1.0
# Rendered before the limits, so that codecs, the time zone and lazy imports are loaded while files can be opened.
WARM_UP = r"""{% set n = namespace(a='\n') %}{% for m in messages %}{{ loop.index }}{{ m|tojson(indent=1) }}{% break %}
{% endfor %}{% macro f(x) %}{{ x|trim|upper|urlencode|pprint|e }}{% endmacro %}{{ f('a') }}{{ strftime_now('%c') }}
{{ [1]|random }}{{ '%s'|format(1) }}{{ 'a b'|wordwrap }}{{ 'a'|indent }}{{ 'http://a.b'|urlize }}{{ lipsum(1) }}"""


def environment() -> Any:
    """The sandbox chat templates expect: the same settings, filters and globals as in transformers."""
    import jinja2.debug  # noqa: F401 - loaded now, because later no file can be opened
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what the assistant wrote; here it only renders its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def render(template: Any, variables: dict[str, Any]) -> str:
    """The template's text, given up as soon as it is larger than the limit."""
    parts, size = [], 0
    for part in template.generate(**variables):
        size += len(part)
        if size > MAX_OUTPUT:
            raise ValueError(f"writes more than {MAX_OUTPUT >> 20} MiB")
        parts.append(part)
    return "".join(parts)


def send(answer: dict[str, str]) -> None:
    raw = json.dumps(answer).encode()
    sys.stdout.buffer.write(struct.pack("<I", len(raw)) + raw)
    sys.stdout.buffer.flush()


def receive() -> Any:
    head = sys.stdin.buffer.read(4)
    if len(head) < 4:
        sys.exit(0)
    return json.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]))


def main() -> None:
    sys.path += sys.argv[1:]
    env = environment()
    render(env.from_string(WARM_UP), {"messages": [{"role": "user", "content": "a"}]})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    template = None
    while True:
        request = receive()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process, whatever it is busy with
        try:
            if template is None:
                template = env.from_string(request["template"])
            answer = {"text": render(template, request["variables"])}
        except MemoryError:
            answer = {"error": f"needs more than {MEMORY >> 20} MiB"}
        except RecursionError:
            answer = {"error": "nests too deeply"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(answer)


if __name__ == "__main__":
    main()
