"""Random inputs and error bounds, for the tests and for the check that every benchmark makes first.

The bounds follow two rules, both against float64. float32 and float64: |ours - exact| <= 8 * eps *
magnitude for each element, where magnitude is the same formula on absolute values: the size of the
sums behind it. bfloat16 and float16: our largest error is at most twice that of the same formula in
PyTorch in the same dtype, plus the rounding of the output. Of few terms PyTorch's errors may all be
small by luck; so 4 * eps * the largest root of the sum of squared terms is allowed always.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dsmoe_ext import reference

LARGEST_SLOPE = 1.13  # of the activations: 1.0998, 1.1290 and 1.1289


@dataclass
class Case:
    """Inputs of `sparse_ffn`: x [T,H], gates [T,E], three weights [I,H], expert_offsets [E+1]."""

    x: Tensor
    gates: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj_t: Tensor
    expert_offsets: Tensor
    dy: Tensor  # [T,H]
    grad_weight: Tensor | None = None  # [T,E]
    activation: str = "silu"

    def inputs(self) -> tuple[Tensor, ...]:
        """Positional arguments of `sparse_ffn`."""
        return tuple(getattr(self, field.name) for field in fields(self)[:6])

    def to(self, dtype: torch.dtype) -> "Case":
        """The same case in another dtype; gates and grad_weight are float32, or float64 with it."""
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        change: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and value.is_floating_point():
                is_gate = field.name in ("gates", "grad_weight")
                change[field.name] = value.detach().to(gate_dtype if is_gate else dtype)
        return replace(self, **change)


def offsets_of(sizes: list[int]) -> Tensor:
    """expert_offsets int32 [E+1] of a list of expert sizes."""
    return torch.tensor([0, *sizes]).cumsum(0).int()


def random_case(
    seed: int,
    num_tokens: int,
    hidden_size: int,
    sizes: list[int],
    *,
    active: float = 0.5,
    exact_ste: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A case whose pairs are active with probability `active`; values as large as in models."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    num_experts, intermediate_size = len(sizes), sum(sizes)
    mask = torch.rand(num_tokens, num_experts, generator=g) < active
    gates = (torch.rand(num_tokens, num_experts, generator=g) + 0.5) * mask
    scale = max(hidden_size, 1) ** -0.5
    shape = (intermediate_size, hidden_size)
    gate_proj, up_proj, down_proj_t = (normal(*shape, scale=scale) for _ in range(3))
    case = Case(
        normal(num_tokens, hidden_size, scale=1.0),
        gates,
        gate_proj,
        up_proj,
        down_proj_t,
        offsets_of(sizes),
        normal(num_tokens, hidden_size, scale=1.0),
    )
    if exact_ste:
        case.grad_weight = torch.ones_like(gates)
    return case.to(dtype)


def run_case(function: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    """Output and all gradients of `function`: `ops.sparse_ffn` or `reference.sparse_ffn`."""
    names = [field.name for field in fields(case)[:5]]
    leaves = [getattr(case, name).detach().clone().requires_grad_() for name in names]
    options = {} if case.activation == "silu" else {"activation": case.activation}
    y = function(*leaves, case.expert_offsets, grad_weight=case.grad_weight, **options)
    gradients = torch.autograd.grad(y, leaves, case.dy)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(names, gradients, strict=True)}}


def magnitudes(case: Case, norm: int = 1) -> dict[str, Tensor]:
    """Size of the sums behind every result of `run_case`: the norm of their terms.

    1: the formula on absolute values, which bounds what rounding makes of them; 2: the root of the
    sum of squares, near to which it comes as roundings go either way.
    """
    c = case.to(torch.float64)
    tensors = (c.x, c.dy, c.gate_proj, c.up_proj, c.down_proj_t, c.gates)
    x, dy, wg, wu, wd, pair_gates = (t.abs() ** norm for t in tensors)
    gates = reference.expand_experts(pair_gates, c.expert_offsets)
    g, u, da = x @ wg.t(), x @ wu.t(), dy @ wd.t()
    a = g * u
    dg, du = LARGEST_SLOPE**norm * gates * da * u, gates * da * g
    experts = torch.repeat_interleave(reference.expert_sizes(c.expert_offsets))
    dgates = torch.zeros_like(c.gates).index_add_(1, experts, a * da)
    weight = 0.0 if c.grad_weight is None else c.grad_weight.abs() ** norm
    sums = {
        "y": (a * gates) @ wd,
        "dx": dg @ wg + du @ wu,
        "dgates": torch.where(c.gates == 0, dgates * weight, dgates),
        "dgate_proj": dg.t() @ x,
        "dup_proj": du.t() @ x,
        "ddown_proj_t": (a * gates).t() @ dy,
    }
    return {name: total ** (1 / norm) for name, total in sums.items()}


def error_bounds(
    case: Case, function: Callable[..., Tensor] = reference.sparse_ffn
) -> dict[str, tuple[Tensor, Tensor]]:
    """By name as in `run_case`: `function`'s result in float64, and how far ours may be from it:
    each element of float32 and float64, the farthest element of half types. Weights may be wider
    than x, as those that codes stand for are; PyTorch's then are rounded."""
    info = torch.finfo(case.x.dtype)
    exact = run_case(function, case.to(torch.float64))
    if case.x.dtype.itemsize >= 4:
        return {name: (exact[name], 8 * info.eps * m) for name, m in magnitudes(case).items()}
    torchs, roots = run_case(function, case.to(case.x.dtype)), magnitudes(case, norm=2)
    bounds = {}
    for name, e in exact.items():
        torchs_error = _largest((torchs[name].double() - e).abs())
        rounding = info.eps * (_largest(e.abs()) + info.smallest_normal)
        terms = 4 * info.eps * _largest(roots[name])
        bounds[name] = e, torch.maximum(2 * torchs_error + rounding, terms)
    return bounds


def check_case(function: Callable[..., Tensor], case: Case) -> None:
    """Raises AssertionError with the worst error if `function` is not as exact as it must be."""
    bounds = error_bounds(case)
    for name, result in run_case(function, case).items():
        exact, bound = bounds[name]
        error = (result.double() - exact).abs()
        if not (error <= bound).all():
            worst = _largest((error - bound).nan_to_num(float("inf")))
            raise AssertionError(
                f"{name} in {case.x.dtype} is wrong: error {_largest(error):.3g} for values up to "
                f"{_largest(exact.abs()):.3g}, {worst:.3g} above its bound."
            )


def _largest(tensor: Tensor) -> Tensor:
    return tensor.max() if tensor.numel() else tensor.new_zeros(())
