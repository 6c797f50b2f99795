"""For backward ops that make only those gradients that are wanted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def only_wanted(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """None in place of those that are not."""
    return [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]


def empty_gradients(inputs: Sequence[Any], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a backward op returns, for register_fake: no elements where nothing is wanted. An input
    may be None; the first is not."""
    return tuple(
        inputs[0].new_empty(0) if t is None else t.new_empty(t.shape if is_wanted else 0)
        for t, is_wanted in zip(inputs, wanted, strict=True)
    )


def refuse_create_graph(name: str) -> None:
    """For the backward of an op whose backward kernel has no derivative: a second derivative would
    lack its terms, and nobody would notice."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} can be differentiated once only: call backward() or torch.autograd.grad() "
            "without create_graph=True."
        )
