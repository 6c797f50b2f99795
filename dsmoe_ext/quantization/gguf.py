"""Codes and scales of a GGUF's Q8_0, Q4_0 and Q4_1 tensors, taken over as they are.

A block holds 32 weights of one row:
    Q8_0   scale fp16, 32 int8                         w = scale code
    Q4_0   scale fp16, 16 bytes                        w = scale (nibble - 8)
    Q4_1   scale fp16, min fp16, 16 bytes              w = scale nibble + min
The low nibbles are the first 16 weights. Our codes of 4 bits are signed, so Q4_1's min becomes
min + 8 scale, rounded to fp16; everything else is exact.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dsmoe_ext.quantization.codes import QuantizedMatrix, QuantizedWeights

BLOCK = 32
BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}


def matrix_from_blocks(blocks: Tensor, kind: str) -> QuantizedMatrix:
    """The matrix [N,K] of a tensor's bytes, uint8 [N, bytes of a row]; groups along K."""
    if kind not in BITS:
        raise ValueError(f"a GGUF tensor of type {kind} has no codes of ours: {', '.join(BITS)} do")
    num_numbers = 2 if kind == "Q4_1" else 1
    size = 2 * num_numbers + BLOCK * BITS[kind] // 8
    blocks = blocks.unflatten(1, (-1, size))
    numbers = blocks[..., : 2 * num_numbers].contiguous().view(torch.float16)
    codes = blocks[..., 2 * num_numbers :]
    if kind == "Q8_0":
        codes = codes.contiguous().view(torch.int8)
    else:
        codes = torch.cat([codes & 15, codes >> 4], 2).to(torch.int8) - 8
    scales, mins = numbers[..., 0].contiguous(), None
    if kind == "Q4_1":
        mins = (numbers[..., 1].float() + 8 * scales.float()).half()
    return QuantizedMatrix(codes.flatten(1).contiguous(), scales, mins)


def experts_from_gguf(
    path: str | Path, layer: int, expert_offsets: Tensor, permutation: Tensor | None = None
) -> QuantizedWeights:
    """One layer's experts of a LLaMA's GGUF.

    Args:
        expert_offsets: int32 [E+1], multiples of 32: down_proj's blocks lie along the neurons, and
            an expert can have no part of one.
        permutation: [I], of the neurons; the same reason allows whole blocks to move only.
    """
    from gguf import GGUFReader

    if (expert_offsets % BLOCK != 0).any():
        raise ValueError(
            "experts must begin and end at multiples of 32 neurons, as GGUF's blocks do"
        )
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    found = [tensors[f"blk.{layer}.ffn_{name}.weight"] for name in ("gate", "up", "down")]
    kinds = {tensor.tensor_type.name for tensor in found}
    if len(kinds) > 1:
        raise ValueError(f"gate, up and down of layer {layer} differ in type: {sorted(kinds)}")
    kind = kinds.pop()
    gate, up, down = (matrix_from_blocks(torch.tensor(t.data), kind) for t in found)
    down = _map(down, lambda tensor: tensor.t().contiguous())  # [I,H], groups [I/32,H]
    if permutation is not None:
        gate, up = (_map(matrix, lambda tensor: tensor[permutation]) for matrix in (gate, up))
        group = permutation.view(-1, BLOCK)
        if (group != group[:, :1] + torch.arange(BLOCK)).any() or (group[:, 0] % BLOCK != 0).any():
            raise ValueError("the permutation tears blocks of 32 neurons of down_proj apart")
        rows, groups = permutation, group[:, 0] // BLOCK
        down = QuantizedMatrix(
            down.codes[rows], down.scales[groups], None if down.mins is None else down.mins[groups]
        )
    return QuantizedWeights(gate, up, down, expert_offsets, BITS[kind], BLOCK)


def _map(matrix: QuantizedMatrix, change: Callable[[Tensor], Tensor]) -> QuantizedMatrix:
    mins = None if matrix.mins is None else change(matrix.mins)
    return QuantizedMatrix(change(matrix.codes), change(matrix.scales), mins)
