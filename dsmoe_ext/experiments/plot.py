"""A table of dsmoe experiment as a figure: perplexity over the active share, text by text."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .rows import Cell


def draw(cells: dict[str, dict[str, "Cell"]], path: Path) -> None:
    """A point for each row, with the range of its seeds; the axis of perplexity is logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    texts = list(next(iter(cells.values())))
    width = 3.6 * len(texts) + 3.0
    figure, axes = plt.subplots(
        1, len(texts), figsize=(width, 4.0), sharey=True, layout="constrained", squeeze=False
    )
    colours = plt.get_cmap("tab20")
    for panel, text in zip(axes[0], texts, strict=True):
        for index, (name, row) in enumerate(cells.items()):
            cell, marker = row[text], "os^Dv"[index // 20 % 5]
            colour, spread = colours(index % 20), cell.half_range
            panel.errorbar(cell.active, cell.mean, spread, fmt=marker, color=colour, label=name)
        panel.set(title=text, xlabel="active share of the FFN", xlim=(0, 1.02), yscale="log")
        panel.grid(which="both", alpha=0.3)
    axes[0][0].set_ylabel("perplexity / dense")
    axes[0][0].yaxis.set_major_formatter("{x:g}")
    axes[0][0].yaxis.set_minor_formatter("{x:g}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
