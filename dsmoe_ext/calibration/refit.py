"""down_proj refitted to what the router leaves on: a ridge regression, since with the masks fixed
the FFN's output is linear in it.

    minimise ‖A (W + D) - Y‖² + ridge ‖D‖²    A [T,I] masked activations, Y [T,H] wanted output
"""

import torch
from torch import Tensor

from dsmoe_ext.calibration.router import cholesky_of

# In units of the mean diagonal of AᵀA. It pulls towards the dense weights, so neurons that the text
# hardly uses keep theirs.
RIDGE = 0.1


def refit_down_proj(masked: Tensor, error: Tensor, ridge: float = RIDGE) -> Tensor:
    """masked [T,I], error Y - A W [T,H] -> the change D [I,H]."""
    system = cholesky_of(masked.T @ masked, ridge)
    return torch.cholesky_solve((masked.T @ error).double(), system).to(masked.dtype)


def relative_error(error: Tensor, wanted: Tensor) -> float:
    """‖error‖² / ‖wanted‖²."""
    return (error.square().sum() / wanted.square().sum().clamp(min=1e-30)).item()
