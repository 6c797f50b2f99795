"""DSMoE's own table (arXiv 2502.12455, Table 4): perplexity and active share as tau rises."""

import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.measure import threshold
from .bench import ratio
from .record import markdown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .bench import Bench

BANDS = 6  # of layers, in the printed table


class Swept:
    """A calibrated model, or one trained behind it, that the first question makes."""

    def __init__(self, bench: "Bench", target: float, steps: int):
        self.bench, self.target, self.steps = bench, target, steps

    @cached_property
    def model(self) -> "PreTrainedModel":
        model, _ = self.bench.calibrate(self.target)
        if self.steps:
            self.bench.tune(model, self.steps, distill=1.0)
        return model

    def losses(self, tau: float) -> dict[str, Any]:
        """Bench.losses with every layer's threshold at tau."""
        with threshold(self.model, tau):
            return self.bench.losses(self.model)


def sweeps(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a seed by model, in the order of tau; the dense row has none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["what"].get("tau", 0.0)):
        if "tau" in row["what"]:
            name = f"{row['what']['of']}, seed {row['what']['seed']}"
            found.setdefault(name, []).append(row)
    return found


def verdicts(rows: Iterable[dict[str, Any]]) -> list[str]:
    """For every model and text, whether both curves are monotone in tau."""
    lines = []
    for name, sweep in sweeps(rows).items():
        for text in sweep[0]["loss"]:
            losses = [row["loss"][text] for row in sweep]
            shares = [row["active"][text] for row in sweep]
            broken = []
            if losses != sorted(losses):
                broken.append("perplexity does not always rise")
            if shares != sorted(shares, reverse=True):
                broken.append("the active share does not always fall")
            lines.append(f"{name}, {text}: {' and '.join(broken) or 'both curves are monotone'}")
    return lines


def mean_over_texts(row: dict[str, Any]) -> list[float]:
    """The active share of every layer."""
    return [sum(shares) / len(shares) for shares in zip(*row["layers"].values(), strict=True)]


def layers_table(rows: Iterable[dict[str, Any]]) -> str:
    """Active shares by bands of layers, mean of texts, as Markdown."""
    cells, header = [], []
    for name, sweep in sweeps(rows).items():
        for row in sweep:
            layers = mean_over_texts(row)
            bands = bands_of(len(layers))
            header = [f"{b.start + 1}-{b.stop}" if len(b) > 1 else f"{b.start + 1}" for b in bands]
            means = [sum(layers[i] for i in band) / len(band) for band in bands]
            title = f"{name}, tau {row['what']['tau']:g}"
            cells.append([title, *(f"{mean:.3f}" for mean in means)])
    return markdown(["active, layers", *header], cells)


def bands_of(num_layers: int) -> list[range]:
    """At most BANDS runs of layers, of nearly equal length."""
    count = min(BANDS, num_layers)
    edges = [index * num_layers // count for index in range(count + 1)]
    return [range(*edge) for edge in itertools.pairwise(edges)]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity over the dense model's and active share over tau, by text; active by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dense = {row["what"]["seed"]: row for row in rows if row["what"]["row"] == "dense"}
    found = sweeps(rows)
    figure, axes = plt.subplots(
        len(found), 3, figsize=(13, 3.6 * len(found)), layout="constrained", squeeze=False
    )
    for (name, sweep), (left, middle, right) in zip(found.items(), axes, strict=True):
        taus = [row["what"]["tau"] for row in sweep]
        base = dense[sweep[0]["what"]["seed"]]
        for text in sweep[0]["loss"]:
            left.plot(taus, [ratio(row, base, text) for row in sweep], "o-", label=text)
            middle.plot(taus, [row["active"][text] for row in sweep], "o-", label=text)
        for row in sweep:
            layers = mean_over_texts(row)
            shade = plt.get_cmap("viridis")(row["what"]["tau"])
            label = f"tau {row['what']['tau']:g}"
            right.plot(range(1, len(layers) + 1), layers, color=shade, label=label)
        left.set(title=name, xlabel="tau", ylabel="perplexity / dense")
        middle.set(xlabel="tau", ylabel="active share of the FFN", ylim=(0, 1.02))
        right.set(xlabel="layer", ylabel="active share of the FFN", ylim=(0, 1.02))
        left.legend(frameon=False)
        right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
