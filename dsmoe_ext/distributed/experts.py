"""Expert parallelism: every rank owns whole experts and computes them for the tokens of all ranks.

    rank r:  its tokens x [T,H] and gates [T,E] (the router is replicated)
      1. the rows of x, and of the gates of rank j's experts, go to rank j        (exchange.py)
      2. rank j runs sparse_ffn on its slabs of the three weights: rows already weighted and summed
         over its experts; no rows is a defined case
      3. the rows come back and are added in rank order

Experts are cuts of one FFN, so a rank owns whole experts of a `Shard(0)` of [I,H].

Where most tokens use most ranks, gathering all tokens everywhere and reducing the partial sums can
move fewer bytes between nodes: traffic.py counts both ways, and the lesser is taken.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from dsmoe_ext.distributed.exchange import combine, dispatch, plan_exchange
from dsmoe_ext.distributed.gather import gather, reduce
from dsmoe_ext.distributed.traffic import count_bytes
from dsmoe_ext.ops import sparse_ffn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

WEIGHTS = ("gate_proj", "up_proj", "down_proj_t")


class ParallelExperts(nn.Module):
    """The experts of one FFN over the ranks of a mesh: x, gates of this rank's tokens -> y.

    weights           the three whole [I,H] tensors, of which this rank keeps its part
    expert_sizes      of all E experts
    experts_per_rank  how many each rank owns, in order; they sum to E. `placement.place` finds an
                      order of the experts that loads the ranks evenly
    mesh              a one-dimensional DeviceMesh
    average           divide the weights' gradients by the number of ranks, as DDP and FSDP do with
                      those of replicated weights: right for a loss that is a mean over ranks
    order             the experts in the order of the ranks; None: as they are numbered
    ranks_per_node    None: as torchrun says
    activation        as for sparse_ffn

    Parameters gate_proj, up_proj, down_proj_t: this rank's rows. DTensors `Shard(0)` of [I,H] where
    all ranks have equally many rows, plain tensors otherwise (DTensor knows even parts only).
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        expert_sizes: Sequence[int],
        experts_per_rank: Sequence[int],
        mesh: "DeviceMesh",
        *,
        average: bool = True,
        order: Sequence[int] | None = None,
        ranks_per_node: int | None = None,
        activation: str = "silu",
    ):
        super().__init__()
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.world = mesh.get_local_rank(), mesh.size()
        self.average = average
        numbers = range(len(expert_sizes))
        self.order = numbers if order is None or list(order) == list(numbers) else list(order)
        self.ranks_per_node, self.activation = ranks_per_node, activation
        if len(experts_per_rank) != self.world or sum(experts_per_rank) != len(expert_sizes):
            raise ValueError(
                f"experts_per_rank {list(experts_per_rank)} must give each of {self.world} ranks "
                f"its share of {len(expert_sizes)} experts"
            )
        if sorted(self.order) != list(numbers):
            raise ValueError(f"order must name each of {len(numbers)} experts once")
        bounds = [0, *accumulate(experts_per_rank)]
        # Of the gates, in the order of the ranks.
        self.columns = [slice(*pair) for pair in pairwise(bounds)]
        rows = [0, *accumulate(expert_sizes)]
        if len(weights[0]) != rows[-1]:
            raise ValueError(f"the experts have {rows[-1]} neurons, the weights {len(weights[0])}")
        self.expert_sizes = list(expert_sizes)
        self.own_sizes = [self.expert_sizes[e] for e in self.own_experts]
        rows_per_rank = {sum(self.expert_sizes[e] for e in self.order[c]) for c in self.columns}
        parts = [torch.arange(rows[e], rows[e + 1]) for e in self.own_experts]
        own = torch.cat([torch.arange(0), *parts]).to(weights[0].device)
        for name, weight in zip(WEIGHTS, weights, strict=True):
            part = weight.detach()[own].contiguous()
            if len(rows_per_rank) == 1:
                part = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            is_frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
            self.register_parameter(name, nn.Parameter(part, not is_frozen))
        self._offsets: Tensor | None = None

    @property
    def own_experts(self) -> Sequence[int]:
        """The numbers of this rank's experts."""
        return self.order[self.columns[self.rank]]

    def offsets(self, device: torch.device) -> Tensor:
        """expert_offsets of this rank's experts. No buffer: DDP would make it the first rank's."""
        if self._offsets is None or self._offsets.device != device:
            sizes = torch.tensor([0, *self.own_sizes], device=device)
            self._offsets = sizes.cumsum(0, dtype=torch.int32)
        return self._offsets

    def forward(self, x: Tensor, gates: Tensor, grad_weight: Tensor | None = None) -> Tensor:
        """x [T,H], gates [T,E] -> y [T,H], as `sparse_ffn` with all experts; T may differ by rank.

        grad_weight [T,E]: as for sparse_ffn; a token also goes where only this weight is not 0.
        """
        if isinstance(self.order, list):
            gates = gates[:, self.order]
            grad_weight = None if grad_weight is None else grad_weight[:, self.order]
        wanted = gates.detach() != 0
        if grad_weight is not None:
            wanted |= grad_weight != 0
        used = torch.stack([wanted[:, c].any(1) for c in self.columns], dim=1)
        exchange, counts = plan_exchange(used, self.group)
        if self.prefers_gather(x, exchange.tokens_per_rank, counts):
            return self._over_all_tokens(x, gates, grad_weight)
        rows = dispatch(x, exchange)
        own_gates = dispatch(gates, exchange, self.columns)
        own_weight = None if grad_weight is None else dispatch(grad_weight, exchange, self.columns)
        y = self.run(rows, own_gates, own_weight)
        return combine(y, exchange)

    def prefers_gather(self, x: Tensor, tokens_per_rank: list[int], counts: Tensor) -> bool:
        """Whether gathering all tokens moves fewer bytes; the same answer on all ranks."""
        if len(set(tokens_per_rank)) > 1:
            return False
        row_bytes = x.shape[1] * x.element_size()
        experts = [c.stop - c.start for c in self.columns]
        rest = (tokens_per_rank[0], row_bytes, experts, self.ranks_per_node)
        return count_bytes(counts, *rest).prefers_gather

    def _over_all_tokens(self, x: Tensor, gates: Tensor, grad_weight: Tensor | None) -> Tensor:
        own = self.columns[self.rank]
        rows, own_gates = gather(x, self.group), gather(gates, self.group)[:, own]
        own_weight = None if grad_weight is None else gather(grad_weight, self.group)[:, own]
        return reduce(self.run(rows, own_gates, own_weight), self.group)

    def run(self, rows: Tensor, gates: Tensor, grad_weight: Tensor | None) -> Tensor:
        """This rank's experts for rows [R,H] from all ranks."""
        if not self.own_sizes:  # adds nothing, but its gradients must meet those of other ranks
            nothing = [t[:0].sum() for t in (rows, gates, *self.local())]
            return torch.zeros_like(rows) + torch.stack(nothing).sum().to(rows)
        gate, up, down = (weight.to(rows.dtype) for weight in self.local())  # autocast
        return sparse_ffn(
            rows,
            gates,
            gate,
            up,
            down,
            self.offsets(rows.device),
            activation=self.activation,
            grad_weight=grad_weight,
        )

    def local(self) -> list[Tensor]:
        """This rank's rows of the three weights, as plain tensors."""
        weights = [getattr(self, name) for name in WEIGHTS]
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        if self.average and self.world > 1:
            weights = [_scale_gradient(w, 1 / self.world) for w in weights]
        return weights


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.factor, None


def _scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    return _ScaleGradient.apply(tensor, factor)
