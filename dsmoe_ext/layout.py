"""How the intermediate dimension I is cut into experts: the sizes, in the order in which their rows
lie in memory."""

from collections.abc import Sequence
from itertools import pairwise


def expert_layout(
    intermediate_size: int,
    num_experts: int = 8,
    expert_sizes: Sequence[int | float] | None = None,
    shared_size: int = 0,
) -> list[int]:
    """Sizes of all experts, the shared one (if any) first; they sum to intermediate_size.

    num_experts cuts what the shared expert leaves into equal routed experts. expert_sizes gives the
    routed sizes themselves instead: integers that sum up, or ratios (floats), which are scaled to
    sum up (MoDSE's unequal experts).
    """
    if not 0 <= shared_size < intermediate_size:
        raise ValueError(
            f"shared_size must lie between 0 and {intermediate_size - 1}, got {shared_size}"
        )
    routed_size = intermediate_size - shared_size
    if expert_sizes is None:
        if num_experts < 1 or routed_size % num_experts:
            raise ValueError(
                f"num_experts = {num_experts} does not divide the {routed_size} routed neurons "
                f"(intermediate_size {intermediate_size} - shared_size {shared_size})"
            )
        sizes = [routed_size // num_experts] * num_experts
    elif any(isinstance(size, float) for size in expert_sizes):
        sizes = _scale_ratios(expert_sizes, routed_size)
    else:
        sizes = [int(size) for size in expert_sizes]
        if not sizes or sum(sizes) != routed_size:
            raise ValueError(
                f"expert_sizes sum to {sum(sizes)}, but {routed_size} neurons are routed "
                f"(intermediate_size {intermediate_size} - shared_size {shared_size})"
            )
    if min(sizes) < 1:
        raise ValueError(f"every expert needs at least one neuron, got sizes {sizes}")
    return [shared_size, *sizes] if shared_size else sizes


def _scale_ratios(ratios: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to ratios that sum to total: rounded boundaries, so no error
    accumulates."""
    scale = total / sum(ratios)
    boundaries, mass = [0], 0.0
    for ratio in ratios:
        mass += ratio
        boundaries.append(round(mass * scale))
    return [end - start for start, end in pairwise(boundaries)]
