"""The page: plain HTML with its style and drawings inside, nothing fetched, no script needed."""

from html import escape
from typing import Any

from torch import Tensor

from .measure import Findings

INK, PALE = "#22303c", "#e8eef1"
STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
p.note {{ color: #5b6975; margin: .2rem 0 .8rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .25rem .9rem .25rem 0; text-align: right;
  border-bottom: 1px solid {PALE}; }} td:first-child, th:first-child {{ text-align: left; }}
.text {{ white-space: pre-wrap; font: 14px/1.9 ui-monospace, monospace; }}
.text span {{ border-radius: 3px; padding: .1rem 0; }}
svg {{ width: 100%; height: auto; }} svg text {{ font: 11px system-ui, sans-serif; fill: {INK}; }}
"""

TITLE = ": what is active"  # how the titles of all pages end


def page(findings: Findings) -> str:
    """The whole document."""
    parts = [
        f"<h1>{escape(findings.name)}</h1>",
        _texts(findings),
        "<h2>Which tokens use much of the model</h2>",
        "<p class='note'>The darker, the more of the FFN a token used, averaged over the layers; "
        "hold the pointer on a token for its share.</p>",
        _coloured(findings.tokens, findings.token_share),
        "<h2>Experts by layer</h2>",
        "<p class='note'>Rows are layers, the first on top; columns are routed experts, the most "
        "used first in every layer; the darker, the more tokens use it.</p>",
        _heat_map(findings.expert_use),
        "<h2>Active share of the FFN by layer</h2>",
        _line([("active", findings.layer_share)], "layer", 0.0, 1.0),
        "<h2>Active share by position in the window</h2>",
        _line([("active", findings.position_share.tolist())], "position", 0.0, 1.0),
        _training(findings.log),
    ]
    title = f"<title>{escape(findings.name)}{TITLE}</title>"
    head = f"<meta charset='utf-8'>{title}<style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def _texts(findings: Findings) -> str:
    rows = "".join(
        f"<tr><td>{escape(row['text'])}</td><td>{row['perplexity']:.2f}</td>"
        f"<td>{row['active']:.1%}</td><td>{row['tokens']:,}</td></tr>"
        for row in findings.rows
    )
    head = "<tr><th>text</th><th>perplexity</th><th>FFN active</th><th>tokens</th></tr>"
    return f"<table id='texts'>{head}{rows}</table>"


def _shade(value: float, low: float, high: float) -> str:
    """A background between white and a deep blue-green; value in [low, high]."""
    part = 0.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    return f"rgba(11,114,133,{0.85 * part:.2f})"


def _coloured(tokens: list[str], share: Tensor) -> str:
    low, high = share.min().item(), share.max().item()
    spans = []
    for token, value in zip(tokens, share.tolist(), strict=True):
        ink = ";color:#fff" if high > low and (value - low) / (high - low) > 0.6 else ""
        spans.append(
            f"<span style='background:{_shade(value, low, high)}{ink}' title='{value:.1%}'>"
            f"{escape(token)}</span>"
        )
    return f"<div class='text' id='tokens'>{''.join(spans)}</div>"


def _heat_map(use: Tensor) -> str:
    layers, experts = use.shape
    width, height = 900 / experts, 12
    cells = "".join(
        f"<rect x='{column * width:.1f}' y='{row * height}' width='{width:.1f}' height='{height}' "
        f"fill='{_shade(value, 0, 1)}'><title>layer {row}: {value:.0%}</title></rect>"
        for row in range(layers)
        for column, value in enumerate(use[row].sort(descending=True).values.tolist())
    )
    return f"<svg id='experts' viewBox='0 0 900 {layers * height}'>{cells}</svg>"


def _line(curves: list[tuple[str, list[float]]], label: str, low: float, high: float) -> str:
    """Curves over 0, 1, 2 .., the vertical axis from low to high."""
    colours = ("#0b7285", "#f08c00", "#c92a2a")
    high = high if high > low else low + 1
    drawn = []
    for mark in range(5):
        value, y = low + (high - low) * mark / 4, 200 - 45 * mark
        drawn.append(f"<line x1='50' x2='890' y1='{y}' y2='{y}' stroke='{PALE}'/>")
        drawn.append(f"<text x='44' y='{y + 4}' text-anchor='end'>{value:.3g}</text>")
    for (name, values), colour in zip(curves, colours, strict=False):
        step = 840 / max(len(values) - 1, 1)
        points = " ".join(
            f"{50 + index * step:.1f},{200 - 180 * (value - low) / (high - low):.1f}"
            for index, value in enumerate(values)
        )
        drawn.append(
            f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2'>"
            f"<title>{escape(name)}</title></polyline>"
        )
    last = max(len(values) for _, values in curves) - 1
    drawn.append(f"<text x='50' y='218'>0</text><text x='890' y='218' text-anchor='end'>{last}")
    drawn.append(f"</text><text x='470' y='218' text-anchor='middle'>{escape(label)}</text>")
    return f"<svg viewBox='0 0 900 225'>{''.join(drawn)}</svg>"


def _training(log: list[dict[str, Any]]) -> str:
    losses = [row["loss"] for row in log if "loss" in row]
    if len(losses) < 2:
        return ""
    active = [row["active"] for row in log if "active" in row]
    drawn = "<h2>Training</h2><p class='note'>Loss of the language model, nats per token.</p>"
    drawn += _line([("loss", losses)], "step", min(losses), max(losses))
    if len(active) > 1:
        drawn += "<p class='note'>Active share of the FFN.</p>"
        drawn += _line([("active", active)], "step", 0.0, 1.0)
    return drawn
