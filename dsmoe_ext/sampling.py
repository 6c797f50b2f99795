"""The draw of sampled STE: which inactive pairs give the router a gradient.

Draws come from a counter (SplitMix64 in plain tensor ops), not from a torch.Generator: the same
numbers on every device, no host sync, visible to torch.compile, and the whole state is one integer
that a checkpoint holds.
"""

import torch
from torch import Tensor

# SplitMix64's increment, 2^64 / golden ratio: consecutive states differ in many bits.
GOLDEN = 0x9E3779B97F4A7C15
# A draw compares 24 random bits, exact in fp32, with the probability.
MIN_PROB = 2.0**-24
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the bits of the unsigned 64-bit value: torch multiplies int64 modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def mix_key(*parts: int) -> int:
    """One int64 from several integers, such as seed and layer: SplitMix64's finaliser, folded over
    them."""
    state = 0
    for part in parts:
        state = (state + part + 1) * GOLDEN & (1 << 64) - 1
        state = (state ^ state >> 30) * _FACTOR_1 & (1 << 64) - 1
        state = (state ^ state >> 27) * _FACTOR_2 & (1 << 64) - 1
        state ^= state >> 31
    return _signed(state)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int64 bits: torch's own repeats the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift(bits, 30)) * _signed(_FACTOR_1)
    bits = (bits ^ _shift(bits, 27)) * _signed(_FACTOR_2)
    return bits ^ _shift(bits, 31)


def draw_weights(key: int, draw: Tensor, num_tokens: int, num_experts: int, prob: float) -> Tensor:
    """grad_weight [T,E] fp32 for sparse_ffn: 1/prob with probability prob, else 0, independently.

    key picks the stream (seed and layer); draw, an int64 0-d tensor, the position in it (step and
    micro-batch).
    """
    start = _mix(_mix(draw * _signed(GOLDEN) + key))
    pair = torch.arange(num_tokens * num_experts, device=draw.device)
    bits = _shift(_mix(start + pair * _signed(GOLDEN)), 40)
    kept = bits < round(prob * 2**24)
    return (kept.to(torch.float32) * (2**24 / round(prob * 2**24))).view(num_tokens, num_experts)
