"""Which neurons of an FFN are always on, and which form an expert.

a_i = act(x g_i) (x u_i)         neuron i's activation            (g, u, d: its weights)
c_i = |a_i| ‖d_i‖                its contribution: the norm of what it adds to the output
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_ext import partition
from dsmoe_ext.calibration.router import RIDGE, ridge_cholesky
from dsmoe_ext.calibration.sums import Moments


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


def group_neurons(sums: Moments, layout: Layout, seed: int) -> Tensor:
    """The order of the neurons, int64 [I]: the shared ones, then expert after expert.

    sums: Moments of (FFN input x [P,H], contributions [P,I]) on some tokens.

    Shared are the neurons that contribute most on average. The others are clustered by the part of
    their contribution that a linear router can see: the least-squares map from whitened x to the
    centred contribution, H numbers per neuron. Neurons that no router could tell apart then share
    an expert. Against clustering the contributions over tokens themselves this drops the noise of
    the sample and the part that is not predictable.
    """
    by_strength = sums.mean_y.argsort(descending=True, stable=True)
    shared = by_strength[: layout.shared_size].sort().values
    routed = by_strength[layout.shared_size :].sort().values
    whitener, _ = ridge_cholesky(sums.gram, RIDGE)
    visible = torch.linalg.solve_triangular(whitener, sums.moment[:, routed], upper=False)
    order = partition.balanced_kmeans(
        visible.T.float().contiguous(), layout.expert_sizes, seed=seed
    )
    return torch.cat([shared, routed[order.to(routed.device)]])


def experts_of_neurons(order: Tensor, layout: Layout) -> Tensor:
    """The routed expert 0..R-1 of every neuron, R for the shared ones. int64 [I]."""
    sizes = torch.tensor(layout.expert_sizes, device=order.device)
    number = torch.arange(len(sizes), device=order.device).repeat_interleave(sizes)
    experts = torch.full_like(order, len(sizes))
    experts[order[layout.shared_size :]] = number
    return experts


def expert_norms(activations: Tensor, strength: Tensor, experts: Tensor, layout: Layout) -> Tensor:
    """[T,R]: for each routed expert the norm of its neurons' contributions.

    activations [T,I], strength [I] (‖d_i‖), experts [I] as above. As one thin GEMM.
    """
    num_experts = len(layout.expert_sizes)
    members = F.one_hot(experts, num_experts + 1)[:, :num_experts] * strength.square()[:, None]
    return (activations.square() @ members.to(activations.dtype)).sqrt_()


def switch_off(activations: Tensor, on: Tensor, experts: Tensor) -> None:
    """Zeroes, in place, the activations [T,I] of neurons whose expert is off. on [T,R] bool."""
    always = on.new_ones(len(on), 1)
    activations *= torch.cat([on, always], dim=1)[:, experts]
