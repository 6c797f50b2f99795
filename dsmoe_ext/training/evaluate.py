"""Perplexity of a causal language model over windows of text.

    perplexity = exp( -(1/N) sum over windows, sum over positions i of log p(token_i | tokens_<i) )

Each window stands alone: its first token (and a BOS) is context only, every other token is
predicted from those before it in the same window; N counts the predicted
tokens. Windows do not overlap. The logarithm is taken in fp32 whatever the dtype of the model.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..layers import find_ffns
from ..statistics import active_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Evaluation:
    """perplexity, loss = log(perplexity), predicted tokens, seconds; active share of the FFN.

    divergence: KL(teacher ‖ model) per predicted token, in nats; None without a teacher.
    """

    perplexity: float
    loss: float
    num_tokens: int
    seconds: float
    tokens_per_second: float
    active: float
    active_per_layer: list[float]
    divergence: float | None = None


def supports_bf16(device: torch.device | str = "cpu") -> bool:
    """True where bf16 matrix products are faster than fp32 ones."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device | str, enabled: bool) -> Any:
    """bf16 autocast on the device, or nothing."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def activity(model: "PreTrainedModel") -> list[torch.Tensor]:
    """How often every expert was used so far, by layer; takes nothing from other readers."""
    return [ffn.activity.totals() for ffn in find_ffns(model)]


def activity_since(model: "PreTrainedModel", before: list[torch.Tensor]) -> list[float]:
    """The share of each FFN used since `before` was taken."""
    return [
        active_share((now - seen.to(now.device)).sum(0), ffn.expert_offsets).item()
        for ffn, now, seen in zip(find_ffns(model), activity(model), before, strict=True)
    ]


@torch.no_grad()
def evaluate(
    model: "PreTrainedModel",
    windows: torch.Tensor,
    *,
    num_context: int = 0,
    batch_size: int = 1,
    bf16: bool = False,
    advance: Callable[[int], None] | None = None,
    teacher: "PreTrainedModel | None" = None,
) -> Evaluation:
    """Perplexity over windows [N,L] int64; `advance(n)` is called with the windows done.

    teacher: a model of the same vocabulary, to measure how far the model's predictions are from it.

    The module's training flag is put back afterwards, and no random number is drawn: evaluating
    in the middle of a training run does not change it.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, divergence, count = 0.0, 0.0, 0
    seen = activity(model)
    start = time.perf_counter()
    try:
        for ids in windows.split(batch_size):
            ids = ids.to(device)
            with autocast(device, bf16):
                logits = model(input_ids=ids, use_cache=False).logits
                wanted = teacher(input_ids=ids, use_cache=False).logits if teacher else logits
            # One window at a time: fp32 logits of a batch would be the largest tensor of all.
            first = max(num_context, 1)
            for row, *both in zip(ids, logits, wanted, strict=True):
                ours, theirs = (part[first - 1 : -1].float() for part in both)
                total += F.cross_entropy(ours, row[first:], reduction="sum").item()
                count += row.numel() - first
                if teacher:
                    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
                    divergence += F.kl_div(ours, theirs, log_target=True, reduction="sum").item()
            if advance:
                advance(len(ids))
    finally:
        model.train(was_training)
    seconds = time.perf_counter() - start
    active = activity_since(model, seen)
    loss = total / max(count, 1)
    if not math.isfinite(loss):
        raise UserError(
            f"the model's loss is {loss}: its weights hold numbers that are not finite, or it "
            "overflows in this dtype (try --dtype fp32)"
        )
    return Evaluation(
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        loss=loss,
        num_tokens=count,
        seconds=seconds,
        tokens_per_second=windows.numel() / max(seconds, 1e-9),
        active=sum(active) / len(active) if active else 1.0,
        active_per_layer=active,
        divergence=divergence / max(count, 1) if teacher else None,
    )
