"""CMoE (arXiv 2502.04416), and what of it does the work: its partition, its router, its weights.

    marker      m_ti = 1 where |a_ti| is one of the K largest of token t, else 0
    shared      the neurons of the highest rates, mean_t m_ti
    experts     balanced k-means of the others' markers m_i, from the neurons of the highest rates
    router      the k experts of the largest |a_r|; r, the representative, is the neuron of the
                expert whose markers are nearest to the expert's mean; gates are 1

S2A2E8: of 8 equal parts 2 are shared, and 2 of the others on. As in the released code, the a of
markers and router are of rows of gate and up at unit length, those of markers also of tokens at
unit length. That code balances one round by an exact assignment; here the k-means is that of our
own partition, whose greedy rule came within a thousandth of the exact one on a layer of SmolLM2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import partition
from ..calibration.dense_ffn import Chunks, DenseFFN
from ..calibration.layerwise import choose_experts, group_layer, grouping_inputs, refit_layer
from ..calibration.neurons import Layout, experts_of_neurons, switch_off
from ..reference import ACTIVATIONS, active_mask
from .skipping import Skipping

MARKED = 10  # K


@dataclass(frozen=True)
class Cut:
    """SsAaEe."""

    num_shared: int
    num_active: int
    num_experts: int

    @classmethod
    def of(cls, num_experts: int, share: float) -> "Cut":
        """Half of what is on is shared, as in S2A2E8 and S4A4E16 for a share of one half."""
        on = max(2, round(share * num_experts))
        return cls(on // 2, on - on // 2, num_experts)

    @property
    def share(self) -> float:
        """What is on, of all experts."""
        return (self.num_shared + self.num_active) / self.num_experts

    def __str__(self) -> str:
        return f"S{self.num_shared}A{self.num_active}E{self.num_experts}"

    def layout(self, neurons: int) -> Layout:
        """What does not divide is shared."""
        size, routed = neurons // self.num_experts, self.num_experts - self.num_shared
        return Layout(neurons - routed * size, [size] * routed)


@dataclass(frozen=True)
class Experts(Skipping):
    """Routed experts. active(x [T,H]): bool [T,R]; experts int64 [I]: that of every neuron, R for
    the shared ones; down_proj_t [I,H]."""

    active: Callable[[Tensor], Tensor]
    experts: Tensor
    layout: Layout
    down_proj_t: Tensor

    def run(self, ffn: DenseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, on = ffn.activate(x), self.active(x)
        switch_off(hidden, on, self.experts)
        always = on.new_ones(len(on), 1)
        return ffn.output(hidden, self.down_proj_t), torch.cat([always, on], dim=1)

    def channels(self, ffn: DenseFFN) -> Tensor:
        sizes = [self.layout.shared_size, *self.layout.expert_sizes]
        return torch.tensor(sizes).double() / self.layout.intermediate_size


@dataclass(frozen=True)
class UnitRows:
    """Neurons without the lengths of their rows. gate, up [n,H]."""

    gate: Tensor
    up: Tensor
    activation: str

    @classmethod
    def of(cls, ffn: DenseFFN) -> "UnitRows":
        gate, up = F.normalize(ffn.gate_proj, dim=1), F.normalize(ffn.up_proj, dim=1)
        return cls(gate, up, ffn.found.activation)

    def __getitem__(self, neurons: Tensor) -> "UnitRows":
        return UnitRows(self.gate[neurons], self.up[neurons], self.activation)

    def magnitudes(self, x: Tensor) -> Tensor:
        """|a| [T,n] of x [T,H]."""
        gate = ACTIVATIONS[self.activation](x @ self.gate.T)
        return gate.mul_(x @ self.up.T).abs_()

    def markers(self, x: Tensor) -> Tensor:
        """bool [T,n]."""
        magnitudes = self.magnitudes(F.normalize(x, dim=1))
        largest = magnitudes.topk(min(MARKED, magnitudes.shape[1]), dim=1).indices
        return torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(1, largest, True)


@dataclass(frozen=True)
class Representatives:
    """The router. rows: those of the R representatives."""

    rows: UnitRows
    num_active: int

    def __call__(self, x: Tensor) -> Tensor:
        """bool [T,R] of x [T,H]."""
        return active_mask(self.rows.magnitudes(x), torch.tensor(0.0), "top_k", self.num_active)


def group_by_markers(markers: Tensor, layout: Layout) -> Tensor:
    """CMoE's order of the neurons, int64 [I]: the shared ones, then expert after expert."""
    by_rate = markers.sum(dim=0).argsort(descending=True, stable=True)
    shared = by_rate[: layout.shared_size].sort().values
    others = by_rate[layout.shared_size :]  # the first of them are where k-means starts
    features = markers[:, others].T.float().contiguous()
    start = torch.arange(len(layout.expert_sizes), device=markers.device)
    order = partition.balanced_kmeans(features, layout.expert_sizes, start=start)
    return torch.cat([shared, others[order.to(others.device)]])


def representatives(markers: Tensor, order: Tensor, layout: Layout) -> Tensor:
    """int64 [R]: of each expert the neuron whose markers are nearest to the expert's mean."""
    found = []
    for neurons in order[layout.shared_size :].split(layout.expert_sizes):
        of_expert = markers[:, neurons].float()  # [T,S]
        distance = (of_expert - of_expert.mean(dim=1, keepdim=True)).abs().sum(dim=0)
        found.append(neurons[distance.argmin()])
    return torch.stack(found)


@dataclass(frozen=True)
class Recipe:
    """CMoE with parts of ours: our partition (neurons.group_neurons), our router ("threshold", on
    for the cut's share), our refit of down_proj."""

    cut: Cut
    our_partition: bool = False
    our_router: bool = False
    our_refit: bool = False

    def __str__(self) -> str:
        ours = {
            "our partition": self.our_partition,
            "our router": self.our_router,
            "our refit": self.our_refit,
        }
        return ", ".join([f"CMoE {self.cut}", *(part for part in ours if ours[part])])

    def fit(self, ffn: DenseFFN, chunks: Chunks, share: float, seed: int) -> Experts:
        """share: what the cut was rounded from; it has its own."""
        layout = self.cut.layout(len(ffn.down_proj_t))
        rows = UnitRows.of(ffn)
        markers = torch.cat([rows.markers(x) for x in grouping_inputs(chunks)])
        if self.our_partition:
            order = group_layer(ffn, chunks, layout, seed)
        else:
            order = group_by_markers(markers, layout)
        experts = experts_of_neurons(order, layout)
        active: Callable[[Tensor], Tensor]
        if self.our_router:
            active = choose_experts(
                ffn, chunks, "threshold", layout, self.cut.share, experts
            ).active
        else:
            rows = rows[representatives(markers, order, layout)]
            active = Representatives(rows, self.cut.num_active)
        down_proj_t = ffn.down_proj_t
        if self.our_refit:
            down_proj_t, _ = refit_layer(ffn, chunks, active, experts)
        return Experts(active, experts, layout, down_proj_t)


def fit_random_half(ffn: DenseFFN, chunks: Chunks, share: float, seed: int) -> Experts:
    """Any neurons, the same for all tokens, with our refit: the others are an expert that is
    never on."""
    neurons = len(ffn.down_proj_t)
    kept = round(share * neurons)
    layout = Layout(kept, [neurons - kept])
    experts = experts_of_neurons(partition.random_order(neurons, seed=seed), layout)

    def active(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)

    return Experts(active, experts, layout, refit_layer(ffn, chunks, active, experts)[0])
