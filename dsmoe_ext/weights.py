"""Weights of an FFN: held as the dense model holds them, and put into another order of neurons."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Weight(nn.Module):
    """A weight and no more, called to be read: offloading and adapters work around such calls.

    Holds it under the name and in the shape of the dense model's linear layer, but is no nn.Linear,
    so that quantisers and LoRA leave it alone.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, *_: object) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}"


class FactoredWeight(nn.Module):
    """A weight of which the routed experts are a centre and residuals of low rank (compress.py).

    [I,H], or two of them on top of each other (gate and up in one), or transposed (down_proj):
    the shared expert's rows, then centre + left_e @ right_e of every routed expert e.
    """

    shared: Tensor
    centre: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, parts: int, sizes: Sequence[int], hidden_size: int, rank: int, **kind: Any):
        super().__init__()
        shared_size, size, num_experts = sizes
        self.is_transposed = parts == 0
        parts = max(parts, 1)
        for name, shape in (
            ("shared", (parts, shared_size, hidden_size)),
            ("centre", (parts, size, hidden_size)),
            ("left", (parts, num_experts, size, rank)),
            ("right", (parts, num_experts, rank, hidden_size)),
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **kind)))

    def forward(self, *_: object) -> Tensor:
        routed = (self.centre[:, None] + self.left @ self.right).flatten(1, 2)
        rows = torch.cat([self.shared, routed], dim=1).flatten(0, 1)
        return rows.t() if self.is_transposed else rows


def check_permutation(
    permutation: Tensor | Sequence[int], size: int, device: torch.device | None
) -> Tensor:
    """The permutation as an int64 tensor [size] on device; an error if it is none."""
    permutation = torch.as_tensor(permutation, device=device, dtype=torch.int64)
    identity = torch.arange(size, device=permutation.device)
    if permutation.shape != (size,) or not torch.equal(permutation.sort().values, identity):
        raise ValueError(f"permutation must hold every number from 0 to {size - 1} once")
    return permutation


@torch.no_grad()
def permuted(weights: Sequence[Tensor], permutation: Tensor) -> list[nn.Parameter]:
    """Copies of a gated MLP's weights whose neuron i is their neuron permutation[i]."""
    *gate_up, down = weights
    copies = []
    for weight in gate_up:
        parts = weight.chunk(2 if len(weights) == 2 else 1)
        copies.append(torch.cat([part[permutation] for part in parts]))
    copies.append(down[:, permutation])
    return [
        nn.Parameter(copy, requires_grad=weight.requires_grad)
        for copy, weight in zip(copies, weights, strict=True)
    ]


def replicated(tensor: Tensor, mesh: "DeviceMesh") -> Tensor:
    """The tensor as a DTensor that every rank of the mesh holds whole."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
