"""The weights of a transformers LlamaMLP as the sparse FFN stores them, and back: only moved, never
rounded."""

import torch
from torch import Tensor, nn

_NAMES = ("gate_proj", "up_proj", "down_proj")


def check_llama_mlp(mlp: nn.Module) -> None:
    """Raises unless mlp is a LLaMA MLP as the kernels compute it: SiLU, no biases."""
    if not all(isinstance(getattr(mlp, name, None), nn.Linear) for name in _NAMES):
        raise TypeError(
            f"{type(mlp).__name__} is no LLaMA MLP: it lacks the linear layers {', '.join(_NAMES)}"
        )
    if any(getattr(mlp, name).bias is not None for name in _NAMES):
        raise ValueError(
            "the MLP has biases (mlp_bias=True), which the sparse FFN does not support"
        )
    activation = type(getattr(mlp, "act_fn", nn.SiLU())).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"the MLP's activation is {activation}; the sparse FFN supports only SiLU")


def check_permutation(permutation, size: int, device) -> Tensor:
    """The permutation as an int64 tensor [size] on device; an error if it is none."""
    permutation = torch.as_tensor(permutation, device=device, dtype=torch.int64)
    identity = torch.arange(size, device=device)
    if permutation.shape != (size,) or not torch.equal(permutation.sort().values, identity):
        raise ValueError(f"permutation must hold every number from 0 to {size - 1} once")
    return permutation


def weights_from_llama_mlp(mlp: nn.Module, permutation: Tensor | None) -> list[Tensor]:
    """gate_proj, up_proj, down_proj_t, [I,H] each, row i being neuron permutation[i] of mlp.

    Without a permutation the first two share mlp's memory; down_proj lies transposed there.
    """
    check_llama_mlp(mlp)
    weights = []
    for name in _NAMES:
        weight = getattr(mlp, name).weight
        rows = weight.detach().t() if name == "down_proj" else weight.detach()
        rows = rows if permutation is None else rows[permutation]
        weights.append(rows.contiguous().requires_grad_(weight.requires_grad))
    return weights


def llama_mlp_from_weights(config, weights: list[Tensor], permutation: Tensor) -> nn.Module:
    """A LlamaMLP (of config, if given) from [I,H] weights whose row i is neuron permutation[i]."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    if config is None:
        intermediate_size, hidden_size = weights[0].shape
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        config = LlamaConfig(**sizes, num_attention_heads=1)
    with torch.device("meta"):
        mlp = LlamaMLP(config)
    check_llama_mlp(mlp)
    order = permutation.argsort()
    for name, weight in zip(_NAMES, weights, strict=True):
        rows = weight.detach()[order]
        rows = rows.t().contiguous() if name == "down_proj" else rows
        getattr(mlp, name).weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
    return mlp
