"""down_proj refitted to what the router leaves on: a ridge regression, since with the masks fixed
the FFN's output is linear in it.

    minimise ‖A V - Y‖² + ridge ‖V - W‖²    A [T,I] masked activations, Y [T,H] wanted output
    V = (AᵀA + ridge)⁻¹ (AᵀY + ridge W)     W [I,H] the dense model's down_proj, transposed
"""

import torch
from torch import Tensor

from dsmoe_ext.calibration.router import ridge_cholesky

# In units of the mean diagonal of AᵀA. It pulls towards the dense weights, so neurons that the text
# hardly uses keep theirs.
RIDGE = 0.1


def refit_down_proj(
    masked: Tensor, wanted: Tensor, weight: Tensor, ridge: float | None = None
) -> Tensor:
    """masked [T,I], wanted [T,H], the dense weight [I,H] -> the new weight [I,H]."""
    system, ridge = ridge_cholesky(masked.T @ masked, RIDGE if ridge is None else ridge)
    moment = (masked.T @ wanted).double() + ridge * weight.double()
    return torch.cholesky_solve(moment, system).to(weight.dtype)
