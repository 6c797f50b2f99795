"""The module that holds an FFN's experts as codes, in place of its three weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_ext import ops
from dsmoe_ext.gradients import only_wanted, refuse_create_graph
from dsmoe_ext.quantization import codes
from dsmoe_ext.quantization.codes import MATRICES, QuantizedWeights, check_format


class _Codes(nn.Module):
    """One matrix's tensors as a file has them (codes.to_tensors). Numbers are kept as the
    integers of their bits, so that no cast of a model to another dtype rounds them."""

    def __init__(self, codes: Tensor, scales: Tensor, mins: Tensor | None = None):
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.view(_BITS[scales.dtype]))
        if mins is not None:
            self.register_buffer("mins", mins.view(_BITS[mins.dtype]))


class _FrozenFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        experts: Any,
        expert_offsets: Tensor,
        grad_weight: Tensor | None,
    ) -> Tensor:
        ctx.experts = experts
        weights = experts.weights(expert_offsets).dequantize(x.dtype)
        options = (ops.activation_index(experts.activation), True, False)
        y, activations = torch.ops.dsmoe.expert_mlp(
            x, gates, *weights, expert_offsets, grad_weight, *options
        )
        ctx.save_for_backward(x, gates, expert_offsets, grad_weight, activations)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_create_graph("sparse_ffn")
        x, gates, expert_offsets, grad_weight, activations = ctx.saved_tensors
        weights = ctx.experts.weights(expert_offsets).dequantize(x.dtype)
        options = (ops.activation_index(ctx.experts.activation), False)
        wanted = ctx.needs_input_grad[:2]
        gradients = torch.ops.dsmoe.expert_mlp_backward(
            dy, x, gates, *weights, expert_offsets, grad_weight, activations, *options,
            *wanted, False, False, False,
        )  # fmt: skip
        return *only_wanted(gradients[:2], wanted), None, None, None


_BITS = {torch.float16: torch.int16, torch.float32: torch.int32}
_NUMBERS = {bits: dtype for dtype, bits in _BITS.items()}
_PARTS = ("codes", "scales", "mins")
_DECODED_TOKENS = 16  # csrc/kernels.h


class QuantizedExperts(nn.Module):
    """Codes of gate_proj, up_proj and down_proj_t [I,H], neurons expert after expert.

    Buffers of each: codes, int8 [I,H] or uint8 [I, ceil(H/2)]; scales and mins as the integers of
    their bits, int32 of channels [I], int16 of groups [I,G]; of down_proj_t [H] and [G,H].
    """

    def __init__(self, weights: QuantizedWeights):
        super().__init__()
        self.hidden_size = weights.gate_proj.codes.shape[1]
        self.bits, self.group_size = weights.bits, weights.group_size
        self.activation = weights.activation
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in MATRICES}
        for name, tensor in codes.to_tensors(weights):
            matrix, part = name.split(".")
            parts[matrix][part] = tensor
        for name, tensors in parts.items():
            self.add_module(name, _Codes(**tensors))

    @classmethod
    def empty(
        cls, hidden_size: int, sizes: Sequence[int], *, bits: int, group_size: int | None = None,
        symmetric: bool | None = None, activation: str = "silu",
        device: torch.device | str | None = None,
    ) -> "QuantizedExperts":  # fmt: skip
        """Of zeros, for a checkpoint to fill. sizes: of the experts."""
        group_size, symmetric = check_format(bits, group_size, symmetric)
        rows = sum(sizes)
        matrices = []
        for name in MATRICES:
            shape: tuple[int, ...]
            if not group_size:
                shape = (hidden_size if name == "down_proj_t" else rows,)
            elif name == "down_proj_t":
                shape = (sum(-(-size // group_size) for size in sizes), hidden_size)
            else:
                shape = (rows, -(-hidden_size // group_size))
            dtype = torch.float16 if group_size else torch.float32
            numbers = torch.zeros(shape, dtype=dtype, device=device)
            zeros = torch.zeros(rows, hidden_size, dtype=torch.int8, device=device)
            mins = None if symmetric else torch.zeros_like(numbers)
            matrices.append(codes.QuantizedMatrix(zeros, numbers, mins))
        gate, up, down = matrices
        return cls(QuantizedWeights(gate, up, down, None, bits, group_size, activation))

    @property
    def is_released(self) -> bool:
        """Whether the codes have moved into packed weights."""
        return getattr(self, MATRICES[0]).codes is None

    def release(self) -> None:
        """Lets go of the codes: packed weights hold them now."""
        for matrix in self.children():
            for name in dict(matrix.named_buffers()):
                setattr(matrix, name, None)

    def check_held(self) -> None:
        """An error if the codes are no longer here."""
        if self.is_released:
            raise RuntimeError(
                "The codes of these experts were packed for inference under torch.no_grad() and "
                "let go of: load the model again to save, train or move it."
            )

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.check_held()
        super()._save_to_state_dict(*args, **kwargs)

    def _tensors(self) -> dict[str, Tensor]:
        """As codes.to_tensors has them."""
        self.check_held()
        return {
            f"{name}.{part}": buffer.view(_NUMBERS.get(buffer.dtype, buffer.dtype))
            for name in MATRICES
            for part, buffer in getattr(self, name).named_buffers()
        }

    def weights(self, expert_offsets: Tensor) -> QuantizedWeights:
        """As ops.pack_quantized takes them."""
        return codes.from_tensors(
            self._tensors(), expert_offsets, hidden_size=self.hidden_size, bits=self.bits,
            group_size=self.group_size, activation=self.activation,
        )  # fmt: skip

    def sparse_ffn(
        self, x: Tensor, gates: Tensor, expert_offsets: Tensor, grad_weight: Tensor | None = None
    ) -> Tensor:
        """ops.sparse_ffn with gradients for x and gates: the codes stay as they are. Weights in x's
        dtype exist for one layer at a time, in the forward and again in the backward; few tokens on
        CUDA need none in inference."""
        # Of an exported program the number of tokens stays open.
        if x.is_cuda and not torch.compiler.is_exporting():
            wants_grad = torch.is_grad_enabled() and (x.requires_grad or gates.requires_grad)
            if not wants_grad and self.decodes(x):
                return self.decode(x, gates, expert_offsets)
        return _FrozenFFN.apply(x, gates, self, expert_offsets, grad_weight)

    def decodes(self, x: Tensor) -> bool:
        """Whether CUDA's kernels of few tokens take x and read the codes, 16 bytes a time."""
        if x.dtype not in (torch.bfloat16, torch.float16):
            return False
        return x.shape[0] <= _DECODED_TOKENS and self.hidden_size % (128 // self.bits) == 0

    def decode(self, x: Tensor, gates: Tensor, expert_offsets: Tensor) -> Tensor:
        """sparse_ffn from the codes themselves, on CUDA."""
        tensors = self._tensors()
        parts = [tensors.get(f"{name}.{part}") for name in MATRICES for part in _PARTS]
        form = (self.bits, self.group_size, ops.activation_index(self.activation))
        return torch.ops.dsmoe.expert_mlp_quantized(x, gates, *parts, expert_offsets, *form)

    def extra_repr(self) -> str:
        groups = f", group_size={self.group_size}" if self.group_size else ""
        return f"bits={self.bits}{groups}"
