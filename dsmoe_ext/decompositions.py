"""The ops in torch's own, for programs that shall run where this package is not: ONNX, ExecuTorch,
`torch.export` files opened without it.

    program.run_decompositions(dsmoe_ext.decompositions())

They are the functions of reference.py, which compute every expert for every token. Inference only,
and of weights that are not packed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dsmoe_ext.ops  # noqa: F401  registers what is decomposed
from dsmoe_ext import reference
from dsmoe_ext.quantization.codes import MATRICES, from_tensors


def decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's default table for run_decompositions, and route, router, expert_mlp and
    expert_mlp_quantized."""
    table: Any = torch.export.default_decompositions()
    dsmoe = torch.ops.dsmoe
    table[dsmoe.route.default] = _route
    table[dsmoe.router.default] = _router
    table[dsmoe.expert_mlp.default] = _expert_mlp
    table[dsmoe.expert_mlp_quantized.default] = _expert_mlp_quantized
    return table


def _route(
    logits: Tensor,
    threshold: Tensor,
    expert_offsets: Tensor,
    method: int,
    top_k: int,
    binary: bool,
    rescale: bool,
    gate_scale: float,
) -> tuple[Tensor, Tensor]:
    return reference.route(
        logits,
        threshold,
        expert_offsets,
        method=reference.METHODS[method],
        top_k=top_k,
        gates="binary" if binary else "scores",
        rescale=rescale,
        gate_scale=gate_scale,
    )


def _router(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)


def _expert_mlp(
    x: Tensor,
    gates: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor | None,
    down_proj_t: Tensor,
    expert_offsets: Tensor,
    grad_weight: Tensor | None,
    activation: int,
    save_activations: bool,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    weights = (gate_proj, up_proj, down_proj_t)
    name = list(reference.ACTIVATIONS)[activation]
    return reference.sparse_ffn(x, gates, *weights, expert_offsets, activation=name), x.new_empty(0)


def _expert_mlp_quantized(x: Tensor, gates: Tensor, *rest: Any) -> Tensor:
    *tensors, expert_offsets, bits, group_size, activation = rest
    names = [f"{matrix}.{part}" for matrix in MATRICES for part in ("codes", "scales", "mins")]
    given = {n: t for n, t in zip(names, tensors, strict=True) if t is not None}
    coded = from_tensors(
        given, expert_offsets, hidden_size=x.shape[1], bits=bits, group_size=group_size
    )
    weights = []
    for name in MATRICES:  # dequantize works in place, which no decomposition may
        matrix, at = getattr(coded, name), coded.numbers_at(name)
        weight = matrix.codes.float() * matrix.scales.float()[at]
        weight = weight if matrix.mins is None else weight + matrix.mins.float()[at]
        weights.append(weight.to(x.dtype))
    gate, up, down = weights
    chosen = list(reference.ACTIVATIONS)[activation]
    return reference.sparse_ffn(x, gates, gate, up, down, expert_offsets, activation=chosen)
