"""down_proj refitted to what the router leaves on: a ridge regression, since with the masks fixed
the FFN's output is linear in it.

    minimise ‖A V - Y‖² + ridge ‖V - W‖²    A [T,I] masked activations, Y [T,H] wanted output
    V = (AᵀA + ridge)⁻¹ (AᵀY + ridge W)     W [I,H] the dense model's down_proj, transposed

AᵀA and AᵀY are sums over tokens (Moments of (A, Y), not centred): no token need be kept.
"""

import torch
from torch import Tensor

from dsmoe_ext.calibration.router import cholesky_solve, ridge_cholesky
from dsmoe_ext.calibration.sums import Moments

# In units of the mean diagonal of AᵀA. It pulls towards the dense weights, so neurons that the text
# hardly uses keep theirs.
RIDGE = 0.1

# Columns of V that are solved for at once: float64 copies are [I,512], not [I,H].
COLUMNS = 512


def refit_down_proj(
    sums: Moments, weight: Tensor, ridge: float | None = None
) -> tuple[Tensor, float]:
    """sums of (masked activations, wanted output), which it uses up, and the dense weight [I,H] ->
    (the new one [I,H], what it leaves of the wanted output's power: ‖A V - Y‖² / ‖Y‖²)."""
    factor, added = ridge_cholesky(sums.take_gram(), RIDGE if ridge is None else ridge)
    found = torch.empty_like(weight)
    power = error = sums.power_y.sum()
    parts = (part.split(COLUMNS, dim=1) for part in (sums.moment, weight, found))
    for moment, narrow, out in zip(*parts, strict=True):
        dense = narrow.double()
        best = cholesky_solve(factor, torch.add(moment, dense, alpha=added))
        # AᵀA V = AᵀY + ridge (W - V), so that no product of size I² H is needed for the error.
        error = error - (best * (moment - added * (dense - best))).sum()
        out.copy_(best)
    return found, (error / power.clamp(min=1e-30)).item()
