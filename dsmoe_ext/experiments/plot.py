"""A table of dsmoe experiment as a figure: perplexity over the active share, text by text."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rows import Cell


def series_of(row: str) -> str:
    """What rows of one method at several shares, or places of its knob, have in common."""
    return re.sub(r"(,| @)? [\d.]+(?=$|, trained$)", "", row)


def draw(cells: dict[str, dict[str, "Cell"]], path: Path) -> None:
    """A point for each row, with the range of its seeds, those of a series joined; the axis of
    perplexity is logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series: dict[str, list[dict[str, Cell]]] = {}
    for name, row in cells.items():
        series.setdefault(series_of(name), []).append(row)
    texts = list(next(iter(cells.values())))
    size = 3.6 * len(texts) + 3.0, max(4.0, 0.22 * len(series))
    figure, axes = plt.subplots(
        1, len(texts), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    colours = plt.get_cmap("tab20")
    for panel, text in zip(axes[0], texts, strict=True):
        for index, (name, rows) in enumerate(series.items()):
            points = sorted((row[text] for row in rows), key=lambda cell: cell.active)
            style = {"fmt": "os^Dv"[index // 20 % 5] + "-", "color": colours(index % 20)}
            share, ratio = [p.active for p in points], [p.mean for p in points]
            panel.errorbar(share, ratio, [p.half_range for p in points], label=name, **style)
        panel.set(title=text, xlabel="active share of the FFN", xlim=(0, 1.02), yscale="log")
        panel.grid(which="both", alpha=0.3)
    low, high = axes[0][0].get_ylim()  # beyond a decade the labels between would overlap
    axes[0][0].set_ylabel("perplexity / dense")
    axes[0][0].yaxis.set_major_formatter("{x:g}")
    axes[0][0].yaxis.set_minor_formatter("{x:g}" if high < 10 * low else "")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
