"""What the demo shows at the end: one table on the terminal, one picture in report.png."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.table import Table

from ..command_line import console

INK, GRID = "#22303c", "#d9dfe4"
DENSE, SPARSE, CALIBRATED, TARGET = "#7a8793", "#0b7285", "#f08c00", "#c92a2a"


def print_report(report: dict[str, Any], out: Path) -> None:
    """The table, what the models write, and where everything is."""
    stages = report["stages"]
    table = Table(
        title=f"{report['model']}, {report['parameters'] / 1e6:.0f} M parameters",
        title_style="bold",
    )
    table.add_column("")
    for name in stages:
        table.add_column(name, justify="right", style="bold" if name == report["last"] else "")
    for label, cells in table_rows(report):
        table.add_row(label, *cells)
    console.out.print(table)
    speed = report["speed"]
    console.out.print(
        f"Speed: {speed['dtype']}, batch 1, threads: {speed['threads']}, best of several runs. "
        f"Perplexity: held-out tenth of the text; Python source and prose (Alice in Wonderland) "
        f"were used by nothing else.",
        style="dim",
    )
    texts = report["texts"]
    for name in ("dense", report["last"]):
        text = f"[dim]{_escaped(texts['prompt'])}[/]{_escaped(texts[name])}"
        console.out.print(Panel(text, title=f"{name} writes", title_align="left", width=88))
    memory = report["peak_memory_gb"]
    console.out.print(
        f"{console.duration(report['minutes'] * 60)}"
        + (f", {memory:.1f} GB of memory at the most" if memory else "")
        + f". Model: {out / 'model'}, picture: {out / 'report.png'}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def table_rows(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(label, one cell per stage) of the table."""
    stages = list(report["stages"].values())
    dense = stages[0]["perplexity"]

    def row(label: str, key: str, show: Callable[[Any], str]) -> tuple[str, list[str]]:
        return label, [show(stage[key]) if key in stage else "" for stage in stages]

    rate = "{:,.0f}".format
    return [
        row("perplexity", "perplexity", "{:.2f}".format),
        row("  against dense", "perplexity", lambda value: f"{value / dense:.2f} x"),
        row("perplexity, Python source", "perplexity_python", "{:.2f}".format),
        row("perplexity, prose", "perplexity_prose", "{:.2f}".format),
        row("FFN active", "active_ffn", "{:.1%}".format),
        row("all parameters active", "active_parameters", "{:.1%}".format),
        row("tokens/s, evaluation", "evaluation", rate),
        row("tokens/s, decoding", "decoding", "{:.1f}".format),
        row("size on disk", "disk_bytes", lambda value: f"{value / 1e6:,.0f} MB"),
    ]


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def draw_report(report: dict[str, Any], path: Path) -> None:
    """Four panels: active by layer; loss, perplexity, active share with threshold by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "font.size": 10,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(13, 8.4), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
        stages, last = report["stages"], report["last"]
        figure.suptitle(
            f"{report['model']}: {stages[last]['active_ffn']:.0%} of the FFN, "
            f"perplexity {stages['dense']['perplexity']:.2f} dense → "
            f"{stages['calibrated']['perplexity']:.2f} calibrated"
            + (f" → {stages[last]['perplexity']:.2f} fine-tuned" if last != "calibrated" else ""),
            fontsize=14,
            fontweight="bold",
        )
        _draw_layers(axes[0, 0], report)
        _draw_loss(axes[0, 1], report)
        _draw_perplexity(axes[1, 0], report)
        _draw_active(axes[1, 1], report)
        figure.savefig(path, dpi=130, format="png")
        plt.close(figure)


def _draw_layers(axis: Any, report: dict[str, Any]) -> None:
    stages, last = report["stages"], report["last"]
    target = report["settings"]["target_active"]
    shares = stages[last]["active_per_layer"]
    layers = range(len(shares))
    axis.bar(layers, shares, color=SPARSE, width=0.72, label=last)
    if last != "calibrated":
        before = stages["calibrated"]["active_per_layer"]
        axis.plot(layers, before, "o", color=CALIBRATED, markersize=4.5, label="calibrated")
    axis.axhline(target, color=TARGET, linestyle="--", linewidth=1.2, label=f"target {target:g}")
    axis.set(title="Share of the FFN that is active, by layer", xlabel="layer", ylim=(0, 1))
    axis.grid(axis="x", visible=False)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.legend(ncols=3, loc="upper right")


def _smooth(values: list[float], span: int) -> list[float]:
    """Mean of up to `span` values to each side."""
    sums = []
    for i in range(len(values)):
        part = values[max(0, i - span) : i + span + 1]
        sums.append(sum(part) / len(part))
    return sums


def _runs(report: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """(name, log, colour) of the trainings that were done."""
    colours = {"fine-tuned": SPARSE, "dense fine-tuned": DENSE}
    return [(name, rows, colours[name]) for name, rows in report["logs"].items()]


def _nothing(axis: Any, title: str) -> None:
    axis.set(title=title, xticks=[], yticks=[])
    axis.text(0.5, 0.5, "no fine-tuning (--steps 0)", ha="center", transform=axis.transAxes)


def _draw_loss(axis: Any, report: dict[str, Any]) -> None:
    if not report["logs"]:
        return _nothing(axis, "Training loss")
    for name, rows, colour in _runs(report):
        steps = [row["step"] for row in rows if "loss" in row]
        losses = [row["loss"] for row in rows if "loss" in row]
        axis.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
        smooth = _smooth(losses, max(1, len(losses) // 12))
        axis.plot(steps, smooth, color=colour, linewidth=2, label=name)
    axis.set(title="Training loss (language model, per token)", xlabel="step")
    axis.legend()


def _draw_perplexity(axis: Any, report: dict[str, Any]) -> None:
    title = "Perplexity on a few held-out windows"
    if not report["logs"]:
        return _nothing(axis, title)
    for name, rows, colour in _runs(report):
        points = [row for row in rows if "held_out_perplexity" in row]
        steps = [row["step"] for row in points]
        values = [row["held_out_perplexity"] for row in points]
        axis.plot(steps, values, "o-", color=colour, linewidth=2, markersize=4, label=name)
        for step, value, place in ((steps[0], values[0], "left"), (steps[-1], values[-1], "right")):
            axis.annotate(
                f"{value:.1f}", (step, value), (0, 6), textcoords="offset points", ha=place
            )
    dense = report["probe_dense"]
    axis.axhline(
        dense, color=INK, linestyle=":", linewidth=1.4, label=f"untouched dense {dense:.1f}"
    )
    axis.set(title=title, xlabel="step")
    axis.margins(y=0.15)
    axis.legend()


def _draw_active(axis: Any, report: dict[str, Any]) -> None:
    title = "Active share and threshold"
    rows = [row for row in report["logs"].get("fine-tuned", []) if "active" in row]
    if not rows:
        return _nothing(axis, title)
    target = report["settings"]["target_active"]
    steps = [row["step"] for row in rows]
    axis.axhspan(target - 0.03, target + 0.03, color=TARGET, alpha=0.10, linewidth=0)
    axis.axhline(
        target, color=TARGET, linestyle="--", linewidth=1.2, label=f"target {target:g} ± 0.03"
    )
    axis.plot(
        steps, [row["active"] for row in rows], color=SPARSE, linewidth=2, label="active share"
    )
    axis.set(title=title, xlabel="step", ylim=(max(0, target - 0.2), min(1, target + 0.2)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right = axis.twinx()
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
    thresholds = [row["thresholds"] for row in rows]
    low, high = [min(t) for t in thresholds], [max(t) for t in thresholds]
    mean = [sum(t) / len(t) for t in thresholds]
    right.fill_between(steps, low, high, color=CALIBRATED, alpha=0.15, linewidth=0)
    right.plot(
        steps, mean, color=CALIBRATED, linewidth=2, label="threshold (mean; range of layers)"
    )
    right.set_ylabel("threshold", color=CALIBRATED)
    right.tick_params(axis="y", colors=CALIBRATED)
    handles = [
        h + r
        for h, r in zip(
            axis.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True
        )
    ]
    axis.legend(*handles, loc="upper right")
