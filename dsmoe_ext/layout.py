"""How the intermediate dimension I is cut into experts: the sizes, in the order in which their rows
lie in memory."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


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


def nested_sizes(intermediate_size: int, levels: int = 4) -> list[int]:
    """I/8, I/8, I/4, I/2 for four levels: slices whose first 1 to 4 are MatFormer's nested FFNs."""
    parts = [2.0 ** -min(level, levels - 1) for level in range(levels, 0, -1)]
    return _scale_ratios(parts, intermediate_size)


def parse_sizes(text: str, intermediate_size: int) -> list[int]:
    """expert_sizes as they are written on the command line, for an FFN of intermediate_size.

    "512,512,256"                      neurons
    "4.5,0.5,4.0"                      ratios: at least one has a point
    "pairs:4.5,0.5;4,1;3,2;2.5,2.5"    MoDSE's: ratios in pairs, every pair with the same sum
    "nested" or "nested:4"             MatFormer's, of four levels
    """
    kind, _, rest = text.strip().rpartition(":")
    if text.strip() == "nested" or kind == "nested":
        levels = 4 if text.strip() == "nested" else _number(rest, int, text)
        if not 1 <= levels <= intermediate_size.bit_length():
            raise ValueError(f"{text!r}: {levels} nested levels do not fit {intermediate_size}")
        return nested_sizes(intermediate_size, levels)
    if kind == "pairs":
        pairs = [[_number(r, float, text) for r in pair.split(",")] for pair in rest.split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{text!r}: every pair has two ratios, such as 4.5,0.5")
        sums = [sum(pair) for pair in pairs]
        if max(sums) - min(sums) > 1e-6 * max(sums):
            raise ValueError(
                f"{text!r}: the pairs sum to {', '.join(f'{s:g}' for s in sums)}, but must be equal"
            )
        return _checked(_scale_ratios([r for pair in pairs for r in pair], intermediate_size), text)
    if kind:
        raise ValueError(f"{text!r}: sizes start with pairs: or nested:, or are a list")
    if "." in text:
        ratios = [_number(part, float, text) for part in text.split(",")]
        return _checked(_scale_ratios(ratios, intermediate_size), text)
    return _checked([_number(part, int, text) for part in text.split(",")], text)


def _number(text: str, kind: type, whole: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{whole!r}: {text!r} is no {kind.__name__}") from None
    if not 0 < value < float("inf"):
        raise ValueError(f"{whole!r}: sizes are positive, but one is {text}")
    return value


def _checked(sizes: list[int], text: str) -> list[int]:
    if min(sizes) < 1:
        raise ValueError(f"{text!r} leaves an expert without a neuron: sizes {sizes}")
    return sizes
