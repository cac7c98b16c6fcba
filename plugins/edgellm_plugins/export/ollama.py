"""The Ollama `Modelfile` that goes with a GGUF file."""

from __future__ import annotations

import re

# Ollama renders Go templates; this is ChatML in that language. `.System` holds all system messages.
CHATML = (
    "{{- if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    '{{- range .Messages }}{{- if ne .Role "system" }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
    "{{ end }}{{ end }}<|im_start|>assistant\n"
)


def is_chatml(template: str) -> bool:
    """Whether a Jinja chat template is recognisably ChatML: its two markers, its roles, and no other markers."""
    markers = set(re.findall(r"<\|[^|<>]{1,40}\|>", template))
    return (
        markers == {"<|im_start|>", "<|im_end|>"}
        and re.search(r"message(\[['\"]role['\"]\]|\.role)", template) is not None
    )


def default_system(template: str) -> str | None:
    """The system prompt that a ChatML template writes when a conversation brings none, if it spells one out."""
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<>|]{1,2000})<\|im_end\|>", template)
    return found.group(1) if found else None


def modelfile(gguf_name: str, template: str | None, stops: tuple[str, ...], temperature: float) -> str:
    """The text of a Modelfile beside `gguf_name`. `stops` end a generation besides the file's own end token."""
    lines = [f"FROM ./{gguf_name}"]
    if template and is_chatml(template):
        lines.append(f'TEMPLATE """{CHATML}"""')
        system = default_system(template)
        if system:
            lines.append(f'SYSTEM """{system}"""')
        stops = tuple(dict.fromkeys((*stops, "<|im_end|>")))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and stop.isprintable()]
    lines.append(f"PARAMETER temperature {temperature:g}")
    return "\n".join(lines) + "\n"
