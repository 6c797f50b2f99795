"""Rounding that knows the data: weights are rounded one term of the sum after another, and what
rounding a term did to the output is made up for by the terms that follow (GPTQ, arXiv 2210.17323).

    minimise ‖X Wᵀ - X Qᵀ‖²                  X [T,K] what the layer sees, known by XᵀX [K,K] alone
    w_j += (q_k - w_k) U_kj / U_kk, j > k    UᵀU = (XᵀX + damping)⁻¹, U upper triangular
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsmoe_ext.quantization.codes import (
    MATRICES,
    QuantizedWeights,
    nearest_codes,
    neuron_groups,
    quantize_weights,
)

# In units of the mean diagonal of XᵀX, as in the paper.
DAMPING = 0.01
# Columns whose errors are collected before they go on to the rest of the matrix.
_BLOCK = 128


def quantize_with_gram(
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj_t: Tensor,
    expert_offsets: Tensor,
    gram_x: Tensor,
    gram_a: Tensor,
    **form: Any,
) -> QuantizedWeights:
    """`quantize_weights` with compensated errors.

    gram_x: [H,H], xᵀx of the FFN's input; gram_a: [I,I], of the activations as down_proj sees
    them, 0 where an expert is off.
    """
    importance = gram_x.diagonal(), gram_a.diagonal()
    plain = quantize_weights(
        gate_proj, up_proj, down_proj_t, expert_offsets, importance=importance, **form
    )
    size = plain.group_size
    matrices = {}
    for name, weight in zip(MATRICES, (gate_proj, up_proj, down_proj_t), strict=True):
        weight, before = weight.detach().float(), getattr(plain, name)
        if name == "down_proj_t":
            groups = neuron_groups(expert_offsets, len(weight), size) if size else None
            mins = None if before.mins is None else before.mins.t()
            codes = _round(weight.t(), gram_a, before.scales.t(), mins, groups, plain.bits)
            codes = codes.t().contiguous()
        else:
            groups = torch.arange(weight.shape[1]) // size if size else None
            codes = _round(weight, gram_x, before.scales, before.mins, groups, plain.bits)
        matrices[name] = replace(before, codes=codes)
    return replace(plain, **matrices)


def _round(
    weight: Tensor,
    gram: Tensor,
    scales: Tensor,
    mins: Tensor | None,
    groups: Tensor | None,
    bits: int,
) -> Tensor:
    """int8 codes [N,K] of weight [N,K]. scales, mins: [N,G], with the group [K] of each term; [N]
    without groups. Terms that the text uses most come first, while all others can make up for
    their errors."""
    order = gram.diagonal().argsort(descending=True)
    weight, gram = weight[:, order], gram[order][:, order]
    scales = scales.float()[:, groups[order]] if groups is not None else scales[:, None]
    if mins is not None and groups is not None:
        mins = mins.float()[:, groups[order]]
    mins = torch.zeros(1) if mins is None else mins
    scales, mins = scales.expand(weight.shape), mins.expand(weight.shape)
    factor = _inverse_factor(gram)
    num_rows, num_terms = weight.shape
    codes = torch.empty(num_rows, num_terms, dtype=torch.int8)
    for begin in range(0, num_terms, _BLOCK):
        end = min(begin + _BLOCK, num_terms)
        block, errors = weight[:, begin:end], torch.empty(num_rows, end - begin)
        for k in range(begin, end):
            column, scale, least = block[:, k - begin], scales[:, k], mins[:, k]
            code = nearest_codes(column, scale, least, bits)
            error = (column - (code * scale + least)) / factor[k, k]
            block[:, k - begin :] -= error[:, None] * factor[k, k:end]
            errors[:, k - begin] = error
            codes[:, order[k]] = code
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return codes


def _inverse_factor(gram: Tensor) -> Tensor:
    """U [K,K], upper triangular, with UᵀU = (gram + damping)⁻¹."""
    gram = gram.double()
    diagonal = gram.diagonal()
    damping = DAMPING * diagonal.mean().clamp(min=1e-30)
    gram = gram + torch.eye(len(gram), dtype=gram.dtype) * damping
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float()
