"""Which neurons of an FFN are always on, and which form an expert.

a_i = silu(x g_i) (x u_i)        neuron i's activation            (g, u, d: its weights)
c_i = |a_i| ‖d_i‖                its contribution: the norm of what it adds to the output
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_ext import partition


@dataclass(frozen=True)
class Layout:
    """How every FFN is cut: shared_size neurons always on, then experts of expert_sizes."""

    shared_size: int
    expert_sizes: list[int]

    @property
    def intermediate_size(self) -> int:
        return self.shared_size + sum(self.expert_sizes)

    def routed_share(self, target_active: float) -> float:
        """The share of the routed neurons that must be on, for target_active of all."""
        routed = sum(self.expert_sizes)
        return (target_active * self.intermediate_size - self.shared_size) / routed


def activations(mlp: nn.Module, x: Tensor) -> Tensor:
    """a [T,I] of x [T,H]."""
    return F.silu(mlp.gate_proj(x)).mul_(mlp.up_proj(x))


def group_neurons(
    contributions: Tensor, x: Tensor, whitener: Tensor, layout: Layout, seed: int
) -> Tensor:
    """The order of the neurons, int64 [I]: the shared ones, then expert after expert.

    contributions [P,I] and FFN inputs x [P,H] of some tokens; whitener [H,H]: the Cholesky factor
    of x's (regularised) covariance.

    Shared are the neurons that contribute most on average. The others are clustered by the part of
    their contribution that a linear router can see: the least-squares map from whitened x to the
    centred contribution, H numbers per neuron. Neurons that no router could tell apart then share
    an expert. Against clustering the contributions over tokens themselves this drops the noise of
    the sample and the part that is not predictable.
    """
    by_strength = contributions.mean(dim=0).argsort(descending=True, stable=True)
    shared = by_strength[: layout.shared_size].sort().values
    routed = by_strength[layout.shared_size :].sort().values
    profile = contributions[:, routed]
    profile = profile - profile.mean(dim=0)
    seen = (x - x.mean(dim=0)).T @ profile  # [H, routed]
    visible = torch.linalg.solve_triangular(whitener, seen.double(), upper=False)
    order = partition.balanced_kmeans(
        visible.T.to(x.dtype).contiguous(), layout.expert_sizes, seed=seed
    )
    return torch.cat([shared, routed[order.to(routed.device)]])


def expert_norms(contributions: Tensor, order: Tensor, layout: Layout) -> Tensor:
    """The norm of each routed expert's contributions. [T,I], order [I] -> [T,R]."""
    routed = contributions[:, order[layout.shared_size :]].square_()
    sizes = layout.expert_sizes
    if len(set(sizes)) == 1:
        sums = routed.view(len(routed), len(sizes), sizes[0]).sum(dim=2)
    else:
        sums = torch.stack([part.sum(dim=1) for part in routed.split(sizes, dim=1)], dim=1)
    return sums.sqrt_()


def switch_off(activations: Tensor, on: Tensor, order: Tensor, layout: Layout) -> None:
    """Zeroes, in place, the activations [T,I] of neurons whose expert is off. on [T,R] bool."""
    sizes = torch.tensor(layout.expert_sizes, device=on.device)
    experts = torch.arange(len(sizes), device=on.device).repeat_interleave(sizes)  # [I - shared]
    mask = torch.ones_like(activations, dtype=torch.bool)
    mask[:, order[layout.shared_size :]] = on[:, experts]
    activations *= mask
