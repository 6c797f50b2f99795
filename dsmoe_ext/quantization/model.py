"""A whole sparse model's experts as codes, rounded by themselves or on what a text shows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsmoe_ext.command_line import console
from dsmoe_ext.ffn import DSMoEFFN
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.models.options import options_of
from dsmoe_ext.quantization.codes import check_format
from dsmoe_ext.reference import ACTIVATIONS, expand_experts, split_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the Gram matrices of the layers that are rounded together may take. Of more layers the text
# runs through the model once more for each part of them.
GRAM_BYTES = 2 << 30


def quantize(
    model: "PreTrainedModel",
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool | None = None,
    *,
    token_ids: Tensor | None = None,
) -> "PreTrainedModel":
    """Puts codes of 8 or 4 bits in place of the experts' weights -> the same model.

    The rest of it stays as it is. Saved and loaded like any model; pack() lays the codes out for
    inference and lets go of them. In training they are frozen: routers, adapters and everything
    else learn past them.

    Args:
        bits, group_size, symmetric: see quantization.codes.quantize_weights.
        token_ids: text like that which the model will see, int64 [N,L] windows. With it rounding
            makes up for its errors (gptq.py): the layers' inputs and activations are taken from it.
    """
    group_size, symmetric = check_format(bits, group_size, symmetric)
    form: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    ffns = ffn_layers(model)
    if any(ffn.experts is not None for ffn in ffns):
        raise ValueError("the experts are quantized already")
    at_once = len(ffns)
    if token_ids is not None:
        most = max(4 * (ffn.hidden_size**2 + ffn.intermediate_size**2) for ffn in ffns)
        at_once = max(1, GRAM_BYTES // most)
    with console.progress("Quantizing", len(ffns), "layers") as advance:
        for first in range(0, len(ffns), at_once):
            part = ffns[first : first + at_once]
            grams: Sequence[Any] = [None] * len(part)
            if token_ids is not None:
                grams = _grams(model, part, token_ids)
            for ffn, gram in zip(part, grams, strict=True):
                ffn.quantize(**form, grams=gram)
                advance(1)
    options_of(model)["quantization"] = form
    return model


class _Gram:
    """A forward hook that sums xᵀx and aᵀa of a layer; a [T,I]: what down_proj sees."""

    def __init__(self, ffn: DSMoEFFN):
        self.x = torch.zeros(ffn.hidden_size, ffn.hidden_size)
        self.a = torch.zeros(ffn.intermediate_size, ffn.intermediate_size)
        self.hook = ffn.register_forward_pre_hook(self.add)

    def add(self, ffn: DSMoEFFN, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, ffn.hidden_size)
        offsets = ffn.offsets_on(x.device)
        gates = ffn.route(x).gates
        gate, up, _ = split_weights(*ffn.expert_weights(x))
        a = ACTIVATIONS[ffn.activation](x @ gate.t()) * (x @ up.t())
        a = a.float() * expand_experts(gates, offsets)
        self.x.addmm_(x.float().t(), x.float())
        self.a.addmm_(a.t(), a)


@torch.no_grad()
def _grams(
    model: "PreTrainedModel", ffns: list[DSMoEFFN], token_ids: Tensor
) -> list[tuple[Tensor, Tensor]]:
    training = model.training
    model.eval()
    grams = [_Gram(ffn) for ffn in ffns]
    try:
        for window in token_ids.split(1):
            model(input_ids=window, use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
        for gram in grams:
            gram.hook.remove()
    return [(gram.x, gram.a) for gram in grams]
