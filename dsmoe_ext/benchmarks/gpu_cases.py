"""What `dsmoe bench gpu` runs: layers, inputs made on the device, a float64 check of large shapes.

The check's rule is for sizes whose element bounds nobody wants to wait for: of every result the
norm of the error, ours against PyTorch's in the same dtype, both against float64.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_ext import ops
from dsmoe_ext.testing import Case, offsets_of

REPEATS = 10  # of a checked case: a race moves bits
NAMES = ("y", "dx", "dgates", "dgate_proj", "dup_proj", "ddown_proj_t")


@dataclass(frozen=True)
class Layer:
    """An FFN cut into experts, of which a token uses round(active * E), equally likely."""

    name: str
    hidden_size: int
    sizes: tuple[int, ...]
    active: float


LLAMA_7B = Layer("Llama-2-7B's, 8 experts", 4096, (1376,) * 8, 3 / 8)
FINE = Layer("Llama-2-7B's, a shared quarter and 516 of 16", 4096, (2752, *(16,) * 516), 3 / 8)
TINY = Layer("tiny", 72, (40, 16, 0, 130, 8), 0.5)
RAGGED = Layer("off every tile", 328, (16, 32, 64, 328), 0.9)


def make_case(
    layer: Layer, num_tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """Random inputs as large as in models, the same ones for the same arguments."""
    g = torch.Generator(device=device).manual_seed(num_tokens)
    experts = len(layer.sizes)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    order = torch.rand(num_tokens, experts, generator=g, device=device).argsort(1)
    used = order[:, : max(1, round(layer.active * experts))]
    gates = torch.zeros(num_tokens, experts, device=device).scatter_(1, used, 1.0)
    gates *= torch.rand(gates.shape, generator=g, device=device) + 0.5
    shape, scale = (sum(layer.sizes), layer.hidden_size), layer.hidden_size**-0.5
    gate, up, down = (normal(*shape, scale=scale) for _ in range(3))
    return Case(
        normal(num_tokens, layer.hidden_size),
        gates,
        gate,
        up,
        down,
        offsets_of(list(layer.sizes)).to(device),
        normal(num_tokens, layer.hidden_size),
    )


def expert_loop(
    x: Tensor,
    gates: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj_t: Tensor,
    offsets: Tensor,
) -> Tensor:
    """The layer as a loop over experts in x's dtype; autograd goes through it."""
    y = torch.zeros_like(x)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        tokens = gates[:, expert].nonzero().flatten()
        if len(tokens) == 0 or begin == end:
            continue
        rows, mine = x[tokens], slice(begin, end)
        h = F.silu(rows @ gate_proj[mine].t()) * (rows @ up_proj[mine].t())
        h = h * gates[tokens, expert, None].to(x.dtype)
        y = y.index_add(0, tokens, h @ down_proj_t[mine])
    return y


def results(function: Callable[..., Any], case: Case) -> dict[str, Tensor]:
    """y and every gradient."""
    leaves = [t.detach().clone().requires_grad_() for t in case.inputs()[:5]]
    y = function(*leaves, case.expert_offsets)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, case.dy)), strict=True))


def poison(device: str) -> None:
    """Leaves NaN in 3 GiB that torch's allocator hands out next: what a kernel reads and nobody
    wrote shows."""
    if device != "cpu":
        torch.full((3 << 28,), float("nan"), device=device)


def check_layer(layer: Layer, num_tokens: int, save: bool, device: str) -> dict[str, list[float]]:
    """{result: [relative error, PyTorch's]}. Raises AssertionError for a wrong number, and for bits
    that move between ten calls."""

    def ours(*inputs: Any) -> Tensor:
        return ops.sparse_ffn(*inputs, save_activations=save)

    case = make_case(layer, num_tokens, device)
    wide = replace(case.to(torch.float64), expert_offsets=case.expert_offsets)
    exact, theirs = results(expert_loop, wide), results(expert_loop, case)
    poison(device)
    got = results(ours, case)
    with torch.no_grad():  # which decodes where tokens are few
        for kind, function, inputs in ((exact, expert_loop, wide), (theirs, expert_loop, case),
                                       (got, ops.sparse_ffn, case)):  # fmt: skip
            kind["y, inference"] = function(*inputs.inputs())
    errors = {}
    for name, want in exact.items():
        size = max(float(want.norm()), 1e-30)
        a, b = (float((t.double() - want).norm()) / size for t in (got[name], theirs[name]))
        where = f"{name} of {layer.name}, T {num_tokens}, saved {save}"
        assert a <= 1.5 * b + 1e-3, f"{where}: relative error {a:.1e}, PyTorch's {b:.1e}"
        errors[name] = [a, b]
    for _ in range(REPEATS):
        again = results(ours, case)
        for name, tensor in again.items():
            assert torch.equal(tensor, got[name]), f"{name} of {layer.name} has moving bits"
    return errors
