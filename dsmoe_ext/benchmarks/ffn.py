"""One FFN, sparse against dense: forward (`ffn`, `decode`) and forward with backward (`train`)."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_ext import ops
from dsmoe_ext.benchmarks.machine import Machine
from dsmoe_ext.benchmarks.timing import Timing, interleaved
from dsmoe_ext.testing import Case, check_case, random_case

CACHE_BYTES = 128 * 2**20  # copies of the weights together exceed the last-level cache
CHECKED_TOKENS = 16  # the check against float64 needs no more to go through every path


@dataclass(frozen=True)
class Shape:
    """An FFN and how much of it is used: `active` is the share of each expert's pairs."""

    hidden_size: int
    sizes: tuple[int, ...]
    num_tokens: int
    active: float
    dtype: torch.dtype

    def make(self, seed: int, exact_ste: bool = False) -> Case:
        """Random inputs with exactly round(active * E) experts a token, equally likely."""
        case = random_case(
            seed, self.num_tokens, self.hidden_size, list(self.sizes), active=1.0, dtype=self.dtype
        )
        num_active = round(self.active * len(self.sizes))
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(case.gates.shape, generator=generator).argsort(1)
        case.gates *= torch.zeros_like(case.gates).scatter_(1, order[:, :num_active], 1.0)
        case.grad_weight = torch.ones_like(case.gates) if exact_ste else None
        return case


def active_rows(case: Case) -> int:
    """Sum over active pairs of the expert's size: rows of every GEMM."""
    return int(((case.gates != 0) * case.expert_offsets.diff()).sum())


def forward_cost(case: Case) -> tuple[float, float]:
    """Operations and bytes that the forward needs at least."""
    hidden_size, itemsize = case.x.shape[1], case.x.element_size()
    used = int(((case.gates != 0).any(0) * case.expert_offsets.diff()).sum())
    return 6.0 * active_rows(case) * hidden_size, 3.0 * used * hidden_size * itemsize


def train_cost(case: Case) -> tuple[float, float]:
    """The same for forward and all gradients: 9 GEMMs, 3 of them for inactive pairs if exact."""
    hidden_size, itemsize = case.x.shape[1], case.x.element_size()
    rows = active_rows(case)
    extra = 0
    if case.grad_weight is not None:
        extra = case.x.shape[0] * case.gate_proj.shape[0] - rows
    weights = 3.0 * case.gate_proj.numel() * itemsize
    return 2.0 * hidden_size * (9 * rows + 3 * extra), 3 * weights


def dense(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """LLaMA's FFN in torch; down_proj [H,I]."""
    return F.linear(F.silu(F.linear(x, gate_proj)) * F.linear(x, up_proj), down_proj)


def expert_loop(case: Case) -> torch.Tensor:
    """What one writes first: a Python loop over experts with index and index_add_."""
    y = torch.zeros_like(case.x)
    offsets = case.expert_offsets.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        tokens = case.gates[:, expert].nonzero().flatten()
        x = case.x[tokens]
        h = F.silu(x @ case.gate_proj[begin:end].t()) * (x @ case.up_proj[begin:end].t())
        h = (h @ case.down_proj_t[begin:end]) * case.gates[tokens, expert, None].to(x.dtype)
        y.index_add_(0, tokens, h)
    return y


def forward_methods(case: Case) -> dict[str, Callable[..., Any]]:
    """Dense torch, the loop, and ours with plain and, on the CPU, with packed weights."""
    x, gates, *weights = case.inputs()
    down_proj = case.down_proj_t.t().contiguous()
    methods = {
        "dense": lambda: dense(x, case.gate_proj, case.up_proj, down_proj),
        "loop": lambda: expert_loop(case),
        "plain": lambda: ops.sparse_ffn(x, gates, *weights),
    }
    if x.is_cpu:
        packed = ops.pack_weights(*weights)
        methods["packed"] = lambda: ops.sparse_ffn(x, gates, packed)
    return methods


def train_methods(case: Case) -> dict[str, Callable[..., Any]]:
    """Forward and every gradient: dense torch, the loop, ours."""
    leaves = [t.detach().clone().requires_grad_() for t in case.inputs()[:5]]
    x, gates, gate_proj, up_proj, down_proj_t = leaves
    down_proj = case.down_proj_t.t().contiguous().requires_grad_()
    offsets = case.expert_offsets
    looped = Case(x, gates, gate_proj, up_proj, down_proj_t, offsets, case.dy)

    def ours() -> Tensor:
        weights = (gate_proj, up_proj, down_proj_t)
        return ops.sparse_ffn(x, gates, *weights, offsets, grad_weight=case.grad_weight)

    def gradients(y: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, case.dy)

    dense_inputs = (x, gate_proj, up_proj, down_proj)
    return {
        "dense": lambda: gradients(dense(*dense_inputs), dense_inputs),
        "loop": lambda: gradients(expert_loop(looped), leaves),
        "ours": lambda: gradients(ours(), leaves),
    }


@dataclass(frozen=True)
class Row:
    """One measured method of one case."""

    shape: Shape
    method: str
    timing: Timing
    roofline: float  # seconds of the sparse work; for "dense": of the dense work
    flops: float
    read: float

    def record(self) -> dict[str, Any]:
        """Plain numbers for the JSON file."""
        sizes = self.shape.sizes
        return {
            "hidden_size": self.shape.hidden_size,
            "expert_sizes": list(sizes),
            "num_tokens": self.shape.num_tokens,
            "active": self.shape.active,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "method": self.method,
            **asdict(self.timing),
            "roofline": self.roofline,
            "flops": self.flops,
            "read_bytes": self.read,
        }


def on_device(case: Case, device: str) -> Case:
    """The same case there."""
    values: dict[str, Any] = {f.name: getattr(case, f.name) for f in fields(case)}
    for name, value in values.items():
        values[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    return Case(**values)


def checked_on(device: str) -> Callable[..., Any]:
    """sparse_ffn there, of tensors here."""

    def call(*inputs: Any, grad_weight: Tensor | None = None) -> Tensor:
        weight = None if grad_weight is None else grad_weight.to(device)
        return ops.sparse_ffn(*(t.to(device) for t in inputs), grad_weight=weight).cpu()

    return call


def measure(
    machine: Machine,
    shape: Shape,
    *,
    train: bool,
    exact_ste: bool,
    budget: float,
    methods: Callable[[Case], dict[str, Callable[..., Any]]] | None = None,
    device: str = "cpu",
) -> Iterator[Row]:
    """Checks the kernels on this shape against float64, then times every method on it."""
    few = Shape(
        shape.hidden_size,
        shape.sizes,
        min(shape.num_tokens, CHECKED_TOKENS),
        shape.active,
        shape.dtype,
    )
    check_case(checked_on(device), few.make(0, exact_ste))
    weight_bytes = 3 * shape.hidden_size * sum(shape.sizes) * shape.dtype.itemsize
    copies = 2 if train else max(2, min(16, CACHE_BYTES // weight_bytes))
    cases = [on_device(shape.make(seed, exact_ste), device) for seed in range(copies)]
    make = methods or (train_methods if train else forward_methods)
    turns = [make(case) for case in cases]
    with torch.set_grad_enabled(train):
        by_method = {name: [turn[name] for turn in turns] for name in turns[0]}
        timings = interleaved(by_method, budget, device)
    cost = train_cost if train else forward_cost
    whole = Shape(shape.hidden_size, shape.sizes, shape.num_tokens, 1.0, shape.dtype).make(0)
    for name, timing in timings.items():
        flops, read = cost(whole if name == "dense" else cases[0])
        yield Row(shape, name, timing, machine.roofline(flops, read, shape.dtype), flops, read)
