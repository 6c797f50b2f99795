"""Gated MLPs of any architecture: y = down_proj(act(gate_proj(x)) * up_proj(x)).

`describe` looks at the module, not at the model's name: linear layers of matching shapes without
biases, one known activation, and nothing else inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_ext import reference

SPLIT = ("gate_proj", "up_proj", "down_proj")
# The names under which the linear layers go: gate, up, down; or gate and up in one, down.
NAMES = (
    SPLIT,
    ("w1", "w3", "w2"),  # LFM2
    ("gate_up_proj", "down_proj"),  # Phi-3, GLM: rows of gate, then rows of up
)
# Class or function name -> what the kernels call it.
ACTIVATIONS = {
    **dict.fromkeys(("SiLU", "SiLUActivation", "silu"), "silu"),
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh", "NewGELUActivation"), "gelu_tanh"),
    **dict.fromkeys(("GELU", "GELUActivation", "gelu"), "gelu"),
}
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class GatedMLP:
    """What `describe` finds."""

    names: tuple[str, ...]  # of the linear layers: (gate, up, down) or (gate and up, down)
    activation: str
    hidden_size: int
    intermediate_size: int

    def weights(self, mlp: nn.Module) -> list[nn.Parameter]:
        """gate [I,H], up [I,H] (or both [2I,H]) and down [H,I], as they lie in the module."""
        return [getattr(mlp, name).weight for name in self.names]


class Unsuitable(ValueError):
    """A module that is nearly a gated MLP, and why the sparse FFN cannot take its place."""


def describe(mlp: nn.Module) -> GatedMLP | None:
    """What kind of gated MLP a module is; None if it is none, Unsuitable if it is another kind."""
    for names in NAMES:
        layers: list[Any] = [getattr(mlp, name, None) for name in names]
        if all(isinstance(layer, nn.Module) and hasattr(layer, "weight") for layer in layers):
            break
    else:
        return None
    kind = type(mlp).__name__
    if odd := [layer for layer in layers if type(layer) is not nn.Linear]:
        found = type(odd[0])
        raise Unsuitable(
            f"{kind}.{names[layers.index(odd[0])]} is a {found.__module__}.{found.__name__}, not a "
            "plain nn.Linear: make the model sparse before quantisation, adapters or sharding"
        )
    hidden, intermediate = layers[-1].out_features, layers[-1].in_features
    height = intermediate if len(names) == 3 else 2 * intermediate
    for name, layer in zip(names[:-1], layers, strict=False):
        if layer.weight.shape != (height, hidden):
            raise Unsuitable(
                f"{kind}.{name} has shape {list(layer.weight.shape)}, but down_proj's "
                f"{list(layers[-1].weight.shape)} asks for {[height, hidden]}"
            )
    if any(layer.bias is not None for layer in layers):
        raise Unsuitable(f"{kind} has biases (mlp_bias=True), which the sparse FFN does not have")
    inner = {name: child for name, child in mlp.named_children() if name not in names}
    for name, child in inner.items():
        if name not in _ACTIVATION_NAMES and not _does_nothing(child):
            raise Unsuitable(f"{kind} has a {type(child).__name__} inside ({name})")
    if own := [name for name, _ in mlp.named_parameters(recurse=False)]:
        raise Unsuitable(f"{kind} has a parameter of its own ({own[0]})")
    return GatedMLP(names, _activation(mlp, names), hidden, intermediate)


def kind_of(mlp: nn.Module) -> GatedMLP:
    """What describe finds in a module that is known to be a gated MLP."""
    found = describe(mlp)
    assert found is not None
    return found


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _activation(mlp: nn.Module, names: tuple[str, ...]) -> str:
    found = [getattr(mlp, name) for name in _ACTIVATION_NAMES if hasattr(mlp, name)]
    if not found and names == NAMES[1]:
        return "silu"  # LFM2 calls F.silu
    if not found:
        raise Unsuitable(f"{type(mlp).__name__} does not say what its activation is")
    words, activation = activation_name(found[0])
    if activation is None:
        known = ", ".join(sorted({*ACTIVATIONS.values()}))
        raise Unsuitable(
            f"the MLP's activation is {words}; the sparse FFN knows SiLU, GELU ({known})"
        )
    return activation


def activation_name(function: Any) -> tuple[str, str | None]:
    """What an activation, a module or a function, calls itself, and its name in the kernels."""
    words = getattr(function, "__name__", type(function).__name__)
    if getattr(function, "approximate", "none") == "tanh":
        return words, "gelu_tanh"
    return words, ACTIVATIONS.get(words)


@torch.no_grad()
def probe(mlp: nn.Module, found: GatedMLP) -> None:
    """Raises Unsuitable unless mlp computes what its names say, tried on random tokens."""
    *_, down = weights = found.weights(mlp)
    if down.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, found.hidden_size, generator=generator).to(down.device, down.dtype)
    want = dense_mlp(x, weights, found.activation)
    difference = (mlp(x) - want).abs().max()
    if difference > 16 * torch.finfo(down.dtype).eps * want.abs().max().clamp(min=1e-30):
        raise Unsuitable(
            f"{type(mlp).__name__} has the layers of a gated MLP, but computes something else "
            "than down(act(gate(x)) * up(x))"
        )


def dense_mlp(x: Tensor, weights: Sequence[Tensor], activation: str) -> Tensor:
    """The function itself; x [...,H], weights as GatedMLP.weights gives them."""
    return mlp_activations(x, weights, activation) @ weights[-1].t()


def mlp_activations(x: Tensor, weights: Sequence[Tensor], activation: str) -> Tensor:
    """act(gate(x)) * up(x), [...,I]."""
    if len(weights) == 2:
        gate, up = (x @ weights[0].t()).chunk(2, dim=-1)
    else:
        gate, up = x @ weights[0].t(), x @ weights[1].t()
    return reference.ACTIVATIONS[activation](gate).mul_(up)
