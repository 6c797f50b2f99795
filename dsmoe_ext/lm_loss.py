"""The language-model loss and the divergence from a teacher, some tokens at a time.

A vocabulary of 49 thousand makes fp32 logits the largest tensors of training: written plainly, the
loss makes and clears five of them, each fresh pages, 134 ms for 512 tokens on 2 cores. Here both
passes go through the logits in pieces that stay in the cache: 26 to 34 ms, and no fp32 copy.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_ext.routers.interface import at_least_float32

IGNORE_INDEX = -100
PIECE = 2**22  # logits at once: 16 MiB in fp32


class _CrossEntropySum(torch.autograd.Function):
    """Sum over tokens of -log softmax(logits)[label]; logits [N,V], labels [N]."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        dtype = at_least_float32(logits.dtype)
        total = logits.new_zeros((), dtype=dtype)
        for part, chosen in _pieces(logits, labels):
            total += F.cross_entropy(
                part.to(dtype), chosen, reduction="sum", ignore_index=ignore_index
            )
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, labels, ctx.ignore_index = inputs
        ctx.save_for_backward(logits, labels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        for part, chosen, out in _pieces(logits, labels, dlogits):
            softmax = part.softmax(1, dtype=dtotal.dtype)
            is_kept = chosen != ctx.ignore_index
            index = torch.where(is_kept, chosen, 0).unsqueeze(1)
            softmax.scatter_add_(1, index, softmax.new_full((), -1.0).expand(index.shape))
            out.copy_(softmax.mul_(torch.where(is_kept, dtotal, 0).unsqueeze(1)))
        return dlogits, None, None


class _DivergenceSum(torch.autograd.Function):
    """Sum over kept tokens of KL(softmax wanted || softmax logits); both [N,V], is_kept [N] bool.

    Its gradient, softmax logits - softmax wanted, is made beside it: both need the same two
    softmaxes, which are most of the work.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, is_kept: Tensor) -> Tensor:
        dtype = at_least_float32(logits.dtype)
        total = logits.new_zeros((), dtype=dtype)
        needs_grad = ctx.needs_input_grad[0]
        dlogits = torch.empty_like(logits) if needs_grad else logits
        for part, aim, kept, out in _pieces(logits, wanted, is_kept, dlogits):
            got, aim = part.to(dtype).log_softmax(1), aim.to(dtype).log_softmax(1)
            aim_exp = aim.exp()
            each = torch.linalg.vecdot(aim_exp, aim.sub_(got))
            total += torch.where(kept, each, 0.0).sum()
            if needs_grad:
                out.copy_(got.exp_().sub_(aim_exp).mul_(kept[:, None]))
        if needs_grad:
            ctx.save_for_backward(dlogits)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        return dlogits * dtotal.to(dlogits.dtype), None, None


def divergence(
    logits: Tensor,
    wanted: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """KL(wanted || logits) in fp32, the mean over tokens that predict a label; 0-d.

    logits, wanted: [B,L,V] of student and teacher; the gradient goes to the former only.
    labels: [B,L] int64. num_items_in_batch: what the sum is divided by instead.
    """
    is_kept = F.pad(labels[..., 1:], (0, 1), value=ignore_index) != ignore_index
    total = _DivergenceSum.apply(
        logits.flatten(0, -2), wanted.detach().flatten(0, -2), is_kept.flatten()
    )
    if num_items_in_batch is None:
        num_items_in_batch = is_kept.sum().clamp(min=1)
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


def _pieces(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, PIECE // logits.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss: the mean over tokens with a label, or, if num_items_in_batch
    is given, the sum over them divided by it."""
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    logits, labels = logits.reshape(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
    if torch.compiler.is_compiling():  # the compiler fuses what it can see
        total = F.cross_entropy(
            logits.to(at_least_float32(logits.dtype)),
            labels,
            reduction="sum",
            ignore_index=ignore_index,
        )
    else:
        total = _CrossEntropySum.apply(logits, labels, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device)
