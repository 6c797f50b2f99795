"""FFNs that leave out part of their weights, as functions of the dense FFN and its input.

What is not a DSMoEFFN is fitted (calibration.layerwise.fit_layers) and measured (reads.py) so.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..calibration.dense_ffn import DenseFFN


class Skipping(ABC):
    """What may be left out lies in C channels: input channels, neurons, experts."""

    @abstractmethod
    def run(self, ffn: DenseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y [T,H] of x [T,H], the channels that are on for each token, bool [T,C])."""

    @abstractmethod
    def channels(self, ffn: DenseFFN) -> Tensor:
        """The share of the FFN's weights that lies in each channel, float64 [C]."""

    def output(self, ffn: DenseFFN, x: Tensor) -> Tensor:
        """y alone."""
        return self.run(ffn, x)[0]


def shares(*parts: tuple[float, int]) -> Tensor:
    """float64 [C] of (the weights' share, the number of equal channels in it) after each other."""
    return torch.cat([torch.full((n,), share / n, dtype=torch.float64) for share, n in parts])
