"""Sparsity without experts: each token has its own input channels and neurons (TEAL, CATS), or all
have the same ones (FLAP).

    TEAL   x' = x where |x| > t_x, a = act(x' g) (x' u), y = (a where |a| > t_a) d  arXiv 2408.14690
    CATS   a = act(x g) (x u) where |act(x g)| > t                                 arXiv 2404.08763
    FLAP   y = (a of the kept neurons) d + (mean a of the others) d                arXiv 2312.11983

Thresholds are quantiles over the text, of what the layer sees behind sparse ones; the share is the
same in every layer, where TEAL and FLAP also search for one that differs. Fits of
calibration.layerwise.fit_layers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.dense_ffn import Chunks, DenseFFN
from ..calibration.sums import Histogram, Moments
from .skipping import Skipping, shares

# Magnitudes are counted by their logarithms, from e^-REACH to e^REACH: the bins are then as fine
# for the many small ones as for the few that are a thousand times larger.
REACH = 40.0


def magnitude_above_which(share: float, values: Iterable[Tensor]) -> float:
    """The |value| above which `share` of all values lies."""
    histogram = None
    for value in values:
        if histogram is None:
            histogram = Histogram(-REACH, REACH, value.device)
        histogram.add(value.abs().float().log_())
    assert histogram is not None
    return math.exp(histogram.value_above_which(share))


@dataclass(frozen=True)
class Teal(Skipping):
    """Thresholds on the magnitudes of the FFN's input and of its activations."""

    input_threshold: float
    threshold: float

    def run(self, ffn: DenseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
        inputs_on = x.abs() > self.input_threshold
        hidden = ffn.activate(x * inputs_on)
        on = hidden.abs() > self.threshold
        return ffn.output(hidden.mul_(on)), torch.cat([inputs_on, on], dim=1)

    def channels(self, ffn: DenseFFN) -> Tensor:
        neurons, width = ffn.down_proj_t.shape
        return shares((2 / 3, width), (1 / 3, neurons))


def fit_teal(ffn: DenseFFN, chunks: Chunks, share: float) -> Teal:
    """The share of x on, for gate and up, and the same share of a, for down."""
    of_inputs = magnitude_above_which(share, (x for x, _ in chunks()))
    kept = (x * (x.abs() > of_inputs) for x, _ in chunks())
    threshold = magnitude_above_which(share, (ffn.activate(x) for x in kept))
    return Teal(of_inputs, threshold)


@dataclass(frozen=True)
class Cats(Skipping):
    """A threshold on |act(gate)|; gate_proj is read whole."""

    threshold: float

    def run(self, ffn: DenseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
        on = ffn.activate_gate(x).abs() > self.threshold
        hidden = ffn.activate(x).mul_(on)
        return ffn.output(hidden), torch.cat([on.new_ones(len(on), 1), on], dim=1)

    def channels(self, ffn: DenseFFN) -> Tensor:
        return shares((1 / 3, 1), (2 / 3, len(ffn.down_proj_t)))


def fit_cats(ffn: DenseFFN, chunks: Chunks, share: float) -> Cats:
    """The share of the FFN's bytes: (1 + 2 s) / 3, where s of up and down is on."""
    if share <= 1 / 3:
        raise ValueError(f"CATS reads gate_proj whole, a third of the FFN: {share} is too little")
    gates = (ffn.activate_gate(x) for x, _ in chunks())
    return Cats(magnitude_above_which((3 * share - 1) / 2, gates))


@dataclass(frozen=True)
class Flap(Skipping):
    """kept bool [I], and the bias [H] that stands for the others."""

    kept: Tensor
    bias: Tensor

    def channels(self, ffn: DenseFFN) -> Tensor:
        return shares((1, len(self.kept)))

    def run(self, ffn: DenseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = ffn.activate(x).mul_(self.kept)
        return ffn.output(hidden) + self.bias, self.kept.expand(len(x), -1)


def fit_flap(ffn: DenseFFN, chunks: Chunks, share: float) -> Flap:
    """Kept are the neurons of the largest fluctuation, var(a_i) ‖d_i‖², on the text."""
    seen = Moments()
    for x, _ in chunks():
        hidden = ffn.activate(x).to(x.dtype)
        seen.add(hidden.new_empty(len(hidden), 0), hidden)  # of y alone: means and powers
    fluctuation = seen.power_y * ffn.strength.square()
    kept = torch.zeros_like(fluctuation, dtype=torch.bool)
    kept[fluctuation.topk(round(share * len(kept))).indices] = True
    bias = (seen.mean_y * ~kept) @ ffn.down_proj_t.double()
    return Flap(kept, bias.to(ffn.down_proj_t.dtype))
