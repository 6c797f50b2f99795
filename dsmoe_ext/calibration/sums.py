"""What calibration remembers of a text: sums, which take the same memory for any number of tokens.

Chunks come in as plain tensors; products are formed in the chunk's dtype and summed in float64.
"""

from typing import Any

import torch
from torch import Tensor


class Moments:
    """First and second moments of pairs x [t,m], y [t,n], chunk after chunk.

    mean_x [m], mean_y [n]; gram [m,m] = Σ (x - mean)ᵀ(x - mean); moment [m,n] = Σ (x - mean)ᵀ
    (y - mean); power_y [n] = Σ (y - mean)². All float64. centred=False leaves the means out: then
    they count as 0.
    """

    ROWS = 2048  # of a product formed at once, so that there is no second [m,m]

    def __init__(self, *, centred: bool = True) -> None:
        self.count = 0
        self._centred = centred

    def add(self, x: Tensor, y: Tensor) -> None:
        """Takes in x [t,m], y [t,n]."""
        if self.count == 0:
            # Sums are taken around the first chunk's means, near which little cancels.
            self._shift_x, self._shift_y = self._shift(x), self._shift(y)
            wide: Any = {"dtype": torch.float64, "device": x.device}
            self._sum_x, self._sum_y = x.new_zeros(x.shape[1], **wide), y.new_zeros(1, **wide)
            self._gram = x.new_zeros(x.shape[1], x.shape[1], **wide)
            self._moment = x.new_zeros(x.shape[1], y.shape[1], **wide)
            self._power_y = y.new_zeros(y.shape[1], **wide)
        if self._centred:
            x, y = x - self._shift_x, y - self._shift_y
        self.count += len(x)
        self._sum_x = self._sum_x + x.sum(dim=0)
        self._sum_y = self._sum_y + y.sum(dim=0)
        for begin in range(0, x.shape[1], self.ROWS):
            rows = x[:, begin : begin + self.ROWS].T
            self._gram[begin : begin + self.ROWS] += rows @ x
            self._moment[begin : begin + self.ROWS] += rows @ y
        self._power_y += y.square().sum(dim=0)

    def _shift(self, value: Tensor) -> Tensor:
        return value.mean(dim=0) if self._centred else value.new_zeros(value.shape[1])

    @property
    def mean_x(self) -> Tensor:
        return self._shift_x + self._sum_x / self.count

    @property
    def mean_y(self) -> Tensor:
        return self._shift_y + self._sum_y / self.count

    @property
    def gram(self) -> Tensor:
        if not self._centred:
            return self._gram.clone()
        return self._gram - torch.outer(self._sum_x, self._sum_x / self.count)

    def take_gram(self) -> Tensor:
        """gram without a copy, to be written over: the largest of the sums is gone then."""
        gram = self.gram if self._centred else self._gram
        del self._gram
        return gram

    @property
    def moment(self) -> Tensor:
        if not self._centred:
            return self._moment
        return self._moment - torch.outer(self._sum_x, self._sum_y / self.count)

    @property
    def power_y(self) -> Tensor:
        if not self._centred:
            return self._power_y
        return self._power_y - self._sum_y.square() / self.count


class Histogram:
    """Where values lie, as counts in equal bins from low to high; the ends take in the rest."""

    NUM_BINS = 1 << 16

    def __init__(self, low: float, high: float, device: torch.device | str = "cpu"):
        self.low, self.high = low, max(high, low + 1e-6)
        self.counts = torch.zeros(self.NUM_BINS, dtype=torch.float64, device=device)

    def add(self, values: Tensor, weight: float = 1.0) -> None:
        """Counts every value, of any shape, as `weight`."""
        inside = values.float().clamp(self.low, self.high)
        self.counts += weight * torch.histc(inside, self.NUM_BINS, self.low, self.high)

    def value_above_which(self, share: float) -> float:
        """The value above which `share` of the weight lies, to the width of a bin."""
        below = self.counts.cumsum(0)
        bins = int(torch.searchsorted(below, (1 - share) * below[-1], right=False))
        if share >= 1:  # everything: well below the lowest value that was expected
            return 2 * self.low - self.high
        if share <= 0:
            return 2 * self.high - self.low
        return self.low + (bins + 1) * (self.high - self.low) / self.NUM_BINS
