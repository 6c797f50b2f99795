"""The router in closed form: ridge regression from the FFN's input to each expert's strength.

    minimise ‖X B + b - log N‖² + ridge ‖B‖²       X [T,H], N [T,R] the experts' contribution norms
    logits = SCALE (x B + b - t)                    t: the quantile that leaves the wanted share on

An expert is on where its predicted strength exceeds t, the same for all experts of a layer: so an
expert that is usually weak is usually off.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# The ridge, in units of the mean diagonal of XᵀX (centred).
RIDGE = 0.05
# Strength is in natural logarithms, of which errors are about one half; times 4 the sigmoid is
# decided for most pairs, and still has a gradient near the threshold for fine-tuning.
SCALE = 4.0


@dataclass(frozen=True)
class InputStatistics:
    """mean [H] of the FFN's inputs and cholesky [H,H] (float64, lower) of XᵀX + ridge, centred."""

    mean: Tensor
    cholesky: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "InputStatistics":
        """From x [T,H]."""
        mean = x.mean(dim=0)
        centred = x - mean
        return cls(mean, ridge_cholesky(centred.T @ centred, RIDGE)[0])


def ridge_cholesky(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """(lower Cholesky factor of gram [n,n] + r · 1, r), float64, r = ridge · mean diagonal."""
    gram = gram.double()
    diagonal = gram.diagonal()
    # The smallest normal number keeps inputs that are all zero (a dead layer) solvable.
    ridge = ridge * diagonal.mean() + torch.finfo(torch.float32).tiny
    diagonal += ridge
    return torch.linalg.cholesky(gram), ridge


def fit_router(x: Tensor, norms: Tensor, statistics: InputStatistics) -> tuple[Tensor, Tensor]:
    """weight [R,H], bias [R] of the predicted log norms. x [T,H], norms [T,R] (overwritten)."""
    # A neuron can be silent; the floor keeps its logarithm finite and unimportant.
    strength = norms.add_(1e-8 * norms.mean() + torch.finfo(norms.dtype).tiny).log_()
    mean = strength.mean(dim=0)
    moment = (x - statistics.mean).T @ (strength - mean)
    weight = torch.cholesky_solve(moment.double(), statistics.cholesky).to(x.dtype).T.contiguous()
    return weight, mean - weight @ statistics.mean


def quantile_threshold(strength: Tensor, sizes: list[int], share: float) -> Tensor:
    """The value above which `share` of the routed neurons lie, 0-d. strength [T,R].

    Experts count by their size; ties aside, the share is met within one (token, expert) pair.
    """
    flat = strength.flatten()
    if len(set(sizes)) == 1:
        rank = round((1 - share) * flat.numel())
        return flat.kthvalue(rank).values if rank else flat.min() - 1
    values, order = flat.sort()
    weight = torch.tensor(sizes, device=flat.device, dtype=torch.float64)
    below = weight.repeat(len(strength))[order].cumsum(0)
    rank = int(torch.searchsorted(below, (1 - share) * below[-1], right=True))
    return values[rank - 1] if rank else values[0] - 1
