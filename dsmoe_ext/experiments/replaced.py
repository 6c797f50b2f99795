"""The dense model with something else in place of its FFNs, which need not be a DSMoEFFN."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..calibration.dense_ffn import DenseFFN
from ..gated_mlp import kind_of
from ..models.adopt import gated_mlps, text_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def replaced_ffns(
    dense: "PreTrainedModel", outputs: Sequence[Callable[[DenseFFN, Tensor], Tensor]]
) -> Iterator[None]:
    """Inside, every gated MLP of a dense model gives outputs[l](its FFN, x [T,H]) [T,H].

    x has the model's dtype, and products are those of calibration, whatever autocast says. The
    model is as before afterwards.
    """
    layers = list(gated_mlps(text_model(dense)).values())

    def forward_of(
        mlp: nn.Module, output: Callable[[DenseFFN, Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        found = kind_of(mlp)
        weights = found.weights(mlp)
        ffn = DenseFFN(found, weights)

        def forward(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                tokens = x.flatten(0, -2).to(weights[0].dtype)
                return output(ffn, tokens).view(x.shape).to(x.dtype)

        return forward

    try:
        for mlp, output in zip(layers, outputs, strict=True):
            mlp.forward = forward_of(mlp, output)
        yield
    finally:
        for mlp in layers:
            mlp.__dict__.pop("forward", None)
