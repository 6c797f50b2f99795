"""Rounding that knows the data: weights are rounded one term of the sum after another, and what
rounding a term did to the output is made up for by the terms that follow (GPTQ, arXiv 2210.17323).

    minimise ‖X Wᵀ - X Qᵀ‖²                  X [T,K] what the layer sees, known by XᵀX [K,K] alone
    w_j += (q_k - w_k) U_kj / U_kk, j > k    UᵀU = (XᵀX + damping)⁻¹, U upper triangular
"""

from dataclasses import replace

import torch
from torch import Tensor

from dsmoe_ext.quantization.codes import (
    MATRICES,
    QuantizedMatrix,
    QuantizedWeights,
    group_numbers,
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
    **form,
) -> QuantizedWeights:
    """`quantize_weights` with compensated errors.

    gram_x: [H,H], xᵀx of the FFN's input; gram_a: [I,I], of the activations as down_proj sees
    them, 0 where an expert is off.
    """
    plain = quantize_weights(gate_proj, up_proj, down_proj_t, expert_offsets, **form)
    matrices = {}
    for name, weight in zip(MATRICES, (gate_proj, up_proj, down_proj_t), strict=True):
        weight = weight.detach().float()
        before: QuantizedMatrix = getattr(plain, name)
        symmetric = before.mins is None
        if name == "down_proj_t":
            weight, gram = weight.t(), gram_a
            group = neuron_groups(expert_offsets, plain.group_size or 1)
        else:
            gram = gram_x
            group = torch.arange(weight.shape[1]) // (plain.group_size or weight.shape[1] or 1)
        numbers = None
        if not plain.group_size:  # scales of neurons stay as they are
            scales = before.scales
            numbers = (scales[None] if name == "down_proj_t" else scales[:, None]).expand(
                weight.shape
            )
        codes, scales, mins = _round(weight, gram, group, numbers, plain.bits, symmetric)
        if name == "down_proj_t":
            codes, scales = codes.t().contiguous(), scales.t().contiguous()
            mins = None if mins is None else mins.t().contiguous()
        if not plain.group_size:
            scales, mins = before.scales, None
        matrices[name] = QuantizedMatrix(codes, scales, mins)
    return replace(plain, **matrices)


def _round(
    weight: Tensor, gram: Tensor, group: Tensor, scales: Tensor | None, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes [N,K], scales [N,G], mins [N,G]) of weight [N,K]; group [K] ascending.

    Numbers of a group are taken from its weights as they are when it is reached, unless scales
    [N,K] are given.
    """
    weight = weight.clone()
    num_rows, num_terms = weight.shape
    factor = _inverse_factor(gram)
    codes = torch.zeros(num_rows, num_terms, dtype=torch.int8)
    all_scales, all_mins = [], []
    for begin in range(0, num_terms, _BLOCK):
        end = min(begin + _BLOCK, num_terms)
        block, errors = weight[:, begin:end], torch.zeros(num_rows, end - begin)
        for k in range(begin, end):
            if scales is not None:
                scale, least = scales[:, k], 0
            elif k == 0 or group[k] != group[k - 1]:
                members = weight[:, group == group[k]]
                exists = torch.ones(members.shape[1], dtype=torch.bool)
                scale, least = group_numbers(members, exists, bits=bits, symmetric=symmetric)
                all_scales.append(scale)
                all_mins.append(least)
                scale, least = scale[:, 0].float(), 0 if least is None else least[:, 0].float()
            column = block[:, k - begin]
            codes[:, k] = nearest_codes(column, scale, least, bits)
            error = (column - (codes[:, k] * scale + least)) / factor[k, k]
            block[:, k - begin :] -= error[:, None] * factor[k, k:end]
            errors[:, k - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    if scales is not None:
        return codes, scales, None
    return codes, torch.cat(all_scales, 1), None if symmetric else torch.cat(all_mins, 1)


def _inverse_factor(gram: Tensor) -> Tensor:
    """U [K,K], upper triangular, with UᵀU = (gram + damping)⁻¹."""
    gram = gram.double()
    diagonal = gram.diagonal()
    damping = DAMPING * diagonal.mean().clamp(min=1e-30)
    gram = gram + torch.eye(len(gram), dtype=gram.dtype) * damping
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True).float()
