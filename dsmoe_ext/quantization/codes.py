"""Experts' weights as codes of 8 or 4 bits: w = scale * code, or scale * code + min.

    bits 8                  a scale per output channel, float32: gate's and up's, of neurons, go on
                            the sums before SwiGLU, down's on the sums of all experts
    bits 8 with groups      GGUF's Q8_0: float16 scales of 32 weights along the sum
    bits 4                  groups along the sum, float16: scales alone (Q4_0) or with mins (Q4_1)

Groups of gate_proj and up_proj lie along H; those of down_proj_t along the neurons of an expert,
and begin at its first one: an expert of 40 neurons has one group of 32 and one of 8.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MATRICES = ("gate_proj", "up_proj", "down_proj_t")
MOST_IN_GROUP = 16384  # the kernels divide by it in 32 bits
_SHRINKS = torch.linspace(1.0, 0.75, 11).tolist()  # of a group's range, tried for the least error


@dataclass(frozen=True)
class QuantizedMatrix:
    """One matrix's codes and the numbers that make weights of them."""

    codes: Tensor  # int8 [I,H], from -2^(bits-1) to 2^(bits-1) - 1
    scales: Tensor  # float32 of channels: [I], of down_proj_t [H]; float16 of groups: [I,G], [G,H]
    mins: Tensor | None = None  # like scales; groups only


@dataclass(frozen=True)
class QuantizedWeights:
    """What `quantize_weights` returns and `ops.pack_quantized` lays out for the kernels."""

    gate_proj: QuantizedMatrix
    up_proj: QuantizedMatrix
    down_proj_t: QuantizedMatrix
    expert_offsets: Tensor | None  # int32 [E+1]
    bits: int
    group_size: int  # 0: a scale per output channel
    activation: str = "silu"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """(gate_proj, up_proj, down_proj_t), [I,H] each, as the codes stand for them."""
        gate, up, down = (self._dequantize(name, dtype) for name in MATRICES)
        return gate, up, down

    def _dequantize(self, name: str, dtype: torch.dtype) -> Tensor:
        matrix: QuantizedMatrix = getattr(self, name)
        wide, at = torch.promote_types(dtype, torch.float32), self.numbers_at(name)
        weight = matrix.codes.to(wide).mul_(matrix.scales.to(wide)[at])
        return (weight if matrix.mins is None else weight.add_(matrix.mins.to(wide)[at])).to(dtype)

    def numbers_at(self, name: str) -> tuple[Any, ...]:
        """scales[numbers_at(name)] has a scale for every weight of a matrix, or fits it."""
        codes, is_down = getattr(self, name).codes, name == "down_proj_t"
        if not self.group_size:
            return (None,) if is_down else (slice(None), None)
        if not is_down:
            columns = torch.arange(codes.shape[1], device=codes.device)
            return slice(None), columns // self.group_size
        assert self.expert_offsets is not None
        return (neuron_groups(self.expert_offsets, len(codes), self.group_size),)


def neuron_groups(expert_offsets: Tensor, num_neurons: int, group_size: int) -> Tensor:
    """The group [I] of each neuron, numbered through all experts. Nothing waits for a device."""
    offsets = expert_offsets.long()
    counts = (offsets.diff() + group_size - 1) // group_size
    first = counts.cumsum(0) - counts
    neurons = torch.arange(num_neurons, device=offsets.device)
    experts = torch.bucketize(neurons, offsets[1:], right=True)
    return first[experts] + (neurons - offsets[experts]) // group_size


def quantize_weights(
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj_t: Tensor,
    expert_offsets: Tensor,
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool | None = None,
    activation: str = "silu",
    importance: tuple[Tensor, Tensor] | None = None,
) -> QuantizedWeights:
    """Rounds weights [I,H] to codes.

    Args:
        bits: 8 or 4.
        group_size: 32 or a multiple of 64; 0: one scale per output channel (8 bits only). None:
            0 for 8 bits, 32 for 4.
        symmetric: no mins. None: as long as there are 8 bits.
        importance: mean squares of the terms that gate_proj and up_proj [H], and down_proj [I], are
            multiplied with: what squared errors of groups are weighed by.

    Raises:
        ValueError: for another format, or for weights that are not finite.
    """
    group_size, symmetric = check_format(bits, group_size, symmetric)
    weights = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj_t": down_proj_t}
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    matrices = {}
    for name, weight in weights.items():
        weight = weight.detach().cpu().float().contiguous()
        if not weight.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinity, which has no code: repair the weights."
            )
        if name == "down_proj_t":
            weigh = importance[1] if importance else torch.ones(len(weight))
            matrices[name] = _quantize_down(weight, expert_offsets, weigh, **options)
        else:
            weigh = importance[0] if importance else torch.ones(weight.shape[1])
            matrices[name] = QuantizedMatrix(*quantize_rows(weight, weigh, **options))
    offsets = expert_offsets.detach().cpu().clone()
    return QuantizedWeights(**matrices, expert_offsets=offsets, bits=bits, group_size=group_size,
                            activation=activation)  # fmt: skip


def check_format(bits: int, group_size: int | None, symmetric: bool | None) -> tuple[int, bool]:
    """(group_size, symmetric), with what was left out filled in."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 8 or 4, but is {bits!r}.")
    group_size = {8: 0, 4: 32}[bits] if group_size is None else group_size
    symmetric = bits == 8 if symmetric is None else symmetric
    if group_size != 32 and (not 0 <= group_size <= MOST_IN_GROUP or group_size % 64):
        raise ValueError(
            f"group_size must be 32, a multiple of 64 up to {MOST_IN_GROUP}, or 0 (a scale per "
            f"output channel), but is {group_size}."
        )
    if bits == 4 and not group_size:
        raise ValueError("4 bits need groups: leave group_size out, or give 32 or 64.")
    if not group_size and not symmetric:
        raise ValueError("Scales of channels are symmetric: give a group_size for mins.")
    return group_size, symmetric


def quantize_rows(
    weight: Tensor, importance: Tensor, *, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes [N,K], scales, mins) of a matrix [N,K] with groups along K, whose terms weigh
    importance [K]."""
    num_rows, num_terms = weight.shape
    if not group_size:
        scales = weight.abs().amax(1) / 127 if num_terms else weight.new_zeros(num_rows)
        return nearest_codes(weight, scales[:, None], 0, 8), scales, None
    padded = F.pad(weight, (0, -num_terms % group_size)).unflatten(1, (-1, group_size))
    exists = torch.arange(padded.shape[1] * group_size).view(1, -1, group_size) < num_terms
    weigh = F.pad(importance, (0, -num_terms % group_size)).view(1, -1, group_size)
    numbers = _group_numbers(padded, exists, weigh, bits=bits, symmetric=symmetric)
    scales, mins = numbers
    codes = nearest_codes(padded, scales.float(), 0 if mins is None else mins.float(), bits)
    codes = codes.flatten(1)[:, :num_terms].contiguous()
    return codes, scales[..., 0].contiguous(), None if mins is None else mins[..., 0].contiguous()


def _group_numbers(
    groups: Tensor, exists: Tensor, importance: Tensor, *, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """float16 scales and mins [..., 1] of groups [..., group_size]: of several ranges the one that
    leaves the least squared error. exists: False where a group's last weights are padding."""
    low_code, high_code = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # Symmetric: the largest weight gets the code that has no counterpart, as in Q4_0.
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    low = groups.masked_fill(~exists, float("inf")).amin(-1, keepdim=True)
    high = groups.masked_fill(~exists, float("-inf")).amax(-1, keepdim=True)
    best_error = torch.full_like(largest, float("inf"))
    best_scale = best_min = torch.zeros_like(largest).half()
    for shrink in _SHRINKS:
        if symmetric:
            scale, least = (largest / low_code * shrink).half(), best_min
        else:
            center, reach = (low + high) / 2, (high - low) / 2 * shrink
            scale = (2 * reach / (high_code - low_code)).half()
            least = (center - reach - low_code * scale.float()).half()
        codes = nearest_codes(groups, scale.float(), least.float(), bits)
        error = (codes * scale.float() + least.float() - groups).masked_fill(~exists, 0)
        error = (error.square() * importance).sum(-1, keepdim=True)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_min = torch.where(is_better, least, best_min)
    if not (largest.abs() <= torch.finfo(torch.float16).max).all():
        raise ValueError("A weight lies beyond float16, which groups' scales are kept in.")
    return best_scale, None if symmetric else best_min


def nearest_codes(weight: Tensor, scale: Tensor, least: Tensor | float, bits: int) -> Tensor:
    """int8 codes of the nearest weights; 0 where the scale is 0."""
    codes = ((weight - least) / scale).nan_to_num(0.0, 0.0, 0.0).round()
    return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


def _quantize_down(
    weight: Tensor, expert_offsets: Tensor, importance: Tensor, **options: Any
) -> QuantizedMatrix:
    """down_proj_t: sums run along the neurons, groups along those of one expert."""
    if not options["group_size"]:
        codes_t, channel_scales, _ = quantize_rows(weight.t(), importance, **options)
        return QuantizedMatrix(codes_t.t().contiguous(), channel_scales)
    sizes = expert_offsets.diff().tolist()
    experts = [
        quantize_rows(part.t(), weigh, **options)
        for part, weigh in zip(weight.split(sizes), importance.split(sizes), strict=True)
    ]
    codes, scales, mins = zip(*experts, strict=True)
    whole: list[Any] = [
        None if parts[0] is None else torch.cat([part.t() for part in parts]).contiguous()
        for parts in (codes, scales, mins)
    ]
    return QuantizedMatrix(*whole)


# ------------------------------------------------------------------------------------ state dicts


def to_tensors(weights: QuantizedWeights) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors for a file; codes of 4 bits two to a byte, [I, ceil(H/2)]."""
    for name in MATRICES:
        matrix: QuantizedMatrix = getattr(weights, name)
        codes = matrix.codes
        if weights.bits == 4:
            codes = F.pad(codes, (0, codes.shape[1] % 2)).add(8).to(torch.uint8)
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        yield f"{name}.codes", codes
        yield f"{name}.scales", matrix.scales
        if matrix.mins is not None:
            yield f"{name}.mins", matrix.mins


def from_tensors(tensors: dict[str, Tensor], expert_offsets: Tensor, *, hidden_size: int, bits: int,
                 group_size: int, activation: str = "silu") -> QuantizedWeights:  # fmt: skip
    """to_tensors undone."""
    matrices = {}
    for name in MATRICES:
        codes = tensors[f"{name}.codes"]
        if bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :hidden_size]
            codes = codes.to(torch.int8).sub(8).contiguous()
        matrices[name] = QuantizedMatrix(codes, tensors[f"{name}.scales"],
                                         tensors.get(f"{name}.mins"))  # fmt: skip
    return QuantizedWeights(**matrices, expert_offsets=expert_offsets, bits=bits,
                            group_size=group_size, activation=activation)  # fmt: skip
