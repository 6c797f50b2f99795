"""The router in closed form: ridge regression from the FFN's input to each expert's strength.

    minimise ‖X B + b - log N‖² + ridge ‖B‖²       X [T,H], N [T,R] the experts' contribution norms
    logits = SCALE (x B + b - t)                    t: the quantile that leaves the wanted share on

An expert is on where its predicted strength exceeds t, the same for all experts of a layer: so an
expert that is usually weak is usually off. All comes from sums over tokens: Moments of (X, log N)
for the regression, a Histogram of the predictions for t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe_ext.calibration.sums import Histogram, Moments

# The ridge, in units of the mean diagonal of XᵀX (centred).
RIDGE = 0.05
# Strength is in natural logarithms, of which errors are about one half; times 4 the sigmoid is
# decided for most pairs, and still has a gradient near the threshold for fine-tuning.
SCALE = 4.0
# How far from the mean prediction the histogram reaches, in standard deviations.
HISTOGRAM_REACH = 10.0


@dataclass(frozen=True)
class Strength:
    """The predicted strength x weightᵀ + bias of every routed expert. weight [R,H], bias [R]."""

    weight: Tensor
    bias: Tensor

    def of(self, x: Tensor) -> Tensor:
        """[T,R] of x [T,H]."""
        return torch.addmm(self.bias, x, self.weight.T)


def ridge_cholesky(gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(lower Cholesky factor of gram [n,n] + r · 1, r), r = ridge · mean diagonal. gram, symmetric
    and float64, becomes the factor."""
    # The smallest normal number keeps inputs that are all zero (a dead layer) solvable.
    added = ridge * gram.diagonal().mean().item() + torch.finfo(torch.float32).tiny
    gram.diagonal().add_(added)
    factor = gram.T  # by columns, as LAPACK wants it: no copy of the largest matrix there is
    return torch.linalg.cholesky(factor, out=factor), added


def cholesky_solve(factor: Tensor, rhs: Tensor) -> Tensor:
    """(factor factorᵀ)⁻¹ rhs; torch.cholesky_solve copies the factor."""
    found = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.T, found, upper=True, out=found)


def log_strength(norms: Tensor) -> Tensor:
    """log of the experts' norms [T,R], in place; a silent expert counts as very weak."""
    # The floor keeps the logarithm finite and unimportant.
    return norms.add_(1e-8 * norms.mean() + torch.finfo(norms.dtype).tiny).log_()


def fit_router(sums: Moments, dtype: torch.dtype = torch.float32) -> Strength:
    """From the Moments of (x [T,H], log norms [T,R])."""
    factor, _ = ridge_cholesky(sums.gram, RIDGE)
    weight = cholesky_solve(factor, sums.moment).T
    bias = sums.mean_y - weight @ sums.mean_x
    return Strength(weight.to(dtype).contiguous(), bias.to(dtype))


def strength_histogram(strength: Strength, sums: Moments) -> Histogram:
    """An empty histogram that is wide enough for the predictions on the text of the sums."""
    weight = strength.weight.double()
    mean = sums.mean_y
    deviation = ((weight @ sums.gram) * weight).sum(dim=1).clamp(min=0).div(sums.count).sqrt()
    low = (mean - HISTOGRAM_REACH * deviation).min().item()
    high = (mean + HISTOGRAM_REACH * deviation).max().item()
    return Histogram(low, high, sums.gram.device)


def count_strength(histogram: Histogram, predicted: Tensor, sizes: list[int]) -> None:
    """Adds values [T,R] to the histogram; every expert counts by its size."""
    of_size = torch.tensor(sizes, device=predicted.device)
    for size in set(sizes):
        histogram.add(predicted[:, of_size == size], size)
