"""The figure of the study of seeds: one page with inline SVG, nothing loaded from anywhere."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.seeds_statement import NAMES, Groups, Study, spread

from edgellm_sdk import charts
from edgellm_sdk.page import document, table

COLOURS = {"fedkseed": "c0", "fedkseed-pro": "c1", "fedzo": "c2", "fedavg": "c3", "none": "c5"}


def panel(study: Study, title: str, name: str, factor: float = 1.0) -> str:
    """Mean ± std against K, and the methods without K as dashed lines."""
    curves = {m: study.values(m, name) for m in ("fedkseed", "fedkseed-pro")}
    lines = {m: study.flat(m, name) for m in ("fedzo", "fedavg", "none")}
    scaled = {m: {k: [factor * v for v in values] for k, values in groups.items()} for m, groups in curves.items()}
    return drawn(title, scaled, {m: factor * statistics.mean(values) for m, values in lines.items() if values})


def drawn(title: str, curves: Mapping[str, Groups], lines: Mapping[str, float], log: bool = False) -> str:
    ks = sorted({k for groups in curves.values() for k in groups})
    across = charts.Axis(ks[0] / 1.3, ks[-1] * 1.3, charts.LEFT, charts.WIDTH - charts.RIGHT, log=True)
    ends = [end for groups in curves.values() for values in groups.values() for end in _ends(values)]
    up = charts.axis([*ends, *lines.values()], charts.HEIGHT - charts.BOTTOM, charts.TOP, log=log)
    parts = [_frame(across, up, ks)]
    for method, value in lines.items():
        y = up.at(value)
        parts.append(
            f'<line x1="{across.start}" x2="{across.end}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--{COLOURS[method]})" '
            f'stroke-width="1.8" stroke-dasharray="6 4"><title>{NAMES[method]}: {value:.4g}</title></line>'
        )
    for method, groups in curves.items():
        colour = f"var(--{COLOURS[method]})"
        path = " ".join(f"{across.at(k):.1f},{up.at(statistics.mean(v)):.1f}" for k, v in groups.items())
        parts.append(f'<polyline class="curve" stroke="{colour}" points="{path}"/>')
        for k, values in groups.items():
            x, (low, high) = across.at(k), _ends(values)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up.at(low):.1f}" y2="{up.at(high):.1f}" stroke="{colour}" '
                f'stroke-width="1.6" opacity=".6"/><circle cx="{x:.1f}" cy="{up.at(statistics.mean(values)):.1f}" '
                f'r="3.6" fill="{colour}"><title>K = {k}: {escape(spread(values))}</title></circle>'
            )
    named = [*curves, *lines]
    keys = "".join(f'<span><i style="background:var(--{COLOURS[m]})"></i>{NAMES[m]}</span>' for m in named)
    size = f"0 0 {charts.WIDTH} {charts.HEIGHT}"
    svg = f'<svg viewBox="{size}" role="img" aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg>'
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="keys">{keys}</div>{svg}</figure>'


def _ends(values: Sequence[float]) -> tuple[float, float]:
    reach = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values) - reach, statistics.mean(values) + reach


def _frame(across: charts.Axis, up: charts.Axis, ks: Sequence[int]) -> str:
    base, left, right = charts.HEIGHT - charts.BOTTOM, charts.LEFT, charts.WIDTH - charts.RIGHT
    parts = [f'<line class="axis" x1="{left}" x2="{right}" y1="{base}" y2="{base}"/>']
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{charts.short(tick)}</text>')
    for k in ks:
        parts.append(f'<text x="{across.at(k):.1f}" y="{base + 17}" text-anchor="middle">{k}</text>')
    middle = (left + right) / 2
    return "".join(parts) + f'<text x="{middle:.0f}" y="{charts.HEIGHT - 7}" text-anchor="middle">K, seeds</text>'


def page(study: Study, said: Sequence[str]) -> str:
    rebuilt = {k: [v] for k, v in study.rebuild("fedkseed").items()}
    free = study.rebuild("fedzo").get(0)
    down = {m: study.values(m, "bytes_down") for m in ("fedkseed", "fedkseed-pro")}
    sent = {m: statistics.mean(study.flat(m, "bytes_down")) for m in ("fedzo", "fedavg")}
    figures = [
        panel(study, "Rouge-L F1 in per cent, category held out", "rouge_l_unseen"),
        panel(study, "Rouge-L F1 in per cent, categories trained on", "rouge_l_seen"),
        panel(study, "Loss in nats a token, category held out", "loss_unseen"),
        panel(study, "Loss in nats a token, categories trained on", "loss_seen"),
        drawn("Bytes down, a client and round", down, sent, log=True),
        drawn("Seconds to catch up from theta_0", {"fedkseed": rebuilt}, {"fedzo": free} if free else {}, log=True),
    ]
    columns = ("method", "K", "rate", "Rouge-L unseen", "Rouge-L seen", "loss unseen", "loss seen",
               "bytes down", "bytes up", "forwards", "peak MB")  # fmt: skip
    about = (
        "SmolLM2-135M without its chat template, LoRA-FA on one projection of the last layer, short Alpaca pairs. "
        "In kind the case study of arXiv 2408.10691; not its models, data or figures."
    )
    told = "".join(f"<li>{escape(line)}</li>" for line in "\n".join(said).replace("\n  ", " ").split("\n"))
    body = (
        f"<header><h1>How many candidate seeds does FedKSeed need?</h1><p>{escape(about)}</p></header>"
        f'<section><div class="charts">{"".join(figures)}</div>'
        '<p class="about">Means with one standard deviation over runs. Dashed: methods without K. FedZO is MeZO with a '
        "new seed for every step, FedAvg trains the same tensors by back-propagation, Pro is FedKSeed-Pro.</p>"
        "</section>"
        f'<section><h2>What can be said</h2><ul class="notes">{told}</ul></section>'
        f"<section><h2>All cells</h2>{table(columns, _cells(study))}</section>"
    )
    foot = f"Drawn from the result file of <code>{escape(study.content['command'])}</code>."
    return document("edgellm: how many seeds", body, foot)


def _cells(study: Study) -> list[list[Any]]:
    rows: list[list[Any]] = []
    memory = {(r["method"], r["seeds"]): r["peak_rss_bytes"] for r in study.content["memory"]}
    for method in COLOURS:
        for k in study.values(method, "seed"):
            scores = [spread(study.values(method, f"rouge_l_{w}")[k]) for w in ("unseen", "seen")]
            scores += [spread(study.values(method, f"loss_{w}")[k], 3) for w in ("unseen", "seen")]
            rate, costs = None, [None] * 4
            if method != "none":
                rate = study.values(method, "learning_rate")[k][0]
                names = ("bytes_down", "bytes_up", "forwards")
                costs = [round(statistics.mean(study.values(method, name)[k])) for name in names]
                costs.append(round(memory[method, k] / 1e6) if (method, k) in memory else None)
            rows.append([NAMES[method], k or None, rate, *scores, *costs])
    return rows
