"""The work that the model of GPU time is asked about."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe_ext.benchmarks.gpu_specs import Gpu

DECODE_TOKENS = 16
DTYPES = ("bf16", "tf32", "fp32")


@dataclass(frozen=True)
class Load:
    """Which tokens want which experts: active bool [T,E], and the layout.

    is_saved: the forward keeps g and u, the backward reads them.
    """

    hidden_size: int
    sizes: tuple[int, ...]
    active: torch.Tensor
    is_backward: bool = False
    dtype: str = "bf16"
    is_saved: bool = False

    @property
    def products(self) -> int:
        """Of tokens and an expert's weights: 3 forward; backward da, two for dx, three weight
        gradients, and g and u if they were not saved."""
        if not self.is_backward:
            return 3
        return 6 if self.is_saved else 8

    @property
    def num_tokens(self) -> int:
        return len(self.active)

    @property
    def number_bytes(self) -> float:
        return 2.0 if self.dtype == "bf16" else 4.0

    def neurons(self) -> float:
        """Of all active pairs."""
        return float((self.active * torch.tensor(self.sizes)).sum())

    def flops(self) -> float:
        """Operations of the active pairs."""
        return 2.0 * self.products * self.hidden_size * self.neurons()

    def weight_bytes(self) -> float:
        """Of the experts that any token wants."""
        used = (self.active.any(0) * torch.tensor(self.sizes)).sum()
        return 3 * self.number_bytes * self.hidden_size * float(used)

    def saved_bytes(self) -> float:
        return 2 * self.number_bytes * self.neurons() if self.is_saved else 0.0

    def roofline(self, gpu: Gpu) -> float:
        """Seconds: operations at the peak, or weights, x and y once at full bandwidth; backward
        with the gradients of all of them; what is saved once."""
        moved = self.weight_bytes() + 2 * self.number_bytes * self.num_tokens * self.hidden_size
        moved = moved * (2 if self.is_backward else 1) + self.saved_bytes()
        return max(self.flops() / gpu.peak(self.dtype), moved / gpu.bandwidth)


def draw(num_tokens: int, num_experts: int, fraction: float, seed: int = 0) -> torch.Tensor:
    """bool [T,E]: every pair active with probability `fraction`, independently; for a few tokens
    exactly round(fraction * E) experts each."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num_tokens, num_experts, generator=generator)
    if num_tokens > DECODE_TOKENS:
        return noise < fraction
    return noise.argsort(1).argsort(1) < round(fraction * num_experts)


def read_trace(path: Path, num_experts: int) -> torch.Tensor:
    """bool [T,E] from JSON: {"active": [[experts of token 0], [experts of token 1], ...]}."""
    lists = json.loads(path.read_text())["active"]
    active = torch.zeros(len(lists), num_experts, dtype=torch.bool)
    for token, experts in enumerate(lists):
        active[token, experts] = True
    return active
