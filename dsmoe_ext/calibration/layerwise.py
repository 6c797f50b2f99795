"""calibrate: the loop over the layers, and the sparse model made of what it found."""

import contextlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsmoe_ext import partition
from dsmoe_ext.calibration.neurons import (
    Layout,
    expert_norms,
    experts_of_neurons,
    group_neurons,
    switch_off,
)
from dsmoe_ext.calibration.refit import refit_down_proj
from dsmoe_ext.calibration.router import SCALE, InputStatistics, fit_router, quantile_threshold
from dsmoe_ext.calibration.streams import Layer, Streams, quick_matmul
from dsmoe_ext.command_line import console
from dsmoe_ext.convert import check_dense, merge, sparsify
from dsmoe_ext.gated_mlp import describe, mlp_activations
from dsmoe_ext.layers import ffn_layers, find_ffns
from dsmoe_ext.models.adopt import gated_mlps, text_model
from dsmoe_ext.models.options import options_of
from dsmoe_ext.ops import build_info

# The neurons are grouped on about this many of the tokens; more made no difference.
GROUPING_TOKENS = 4096
# How much of the error that earlier layers left in the hidden state a layer's refit takes on.
CORRECTION = 0.5


@dataclass(frozen=True)
class LayerFit:
    """What makes one dense FFN sparse."""

    order: Tensor  # int64 [I]: the neurons, shared first, then expert after expert
    router_weight: Tensor  # [R,H]
    router_bias: Tensor  # [R]
    down_proj_t: Tensor | None  # [I,H] in that order; None: the dense one
    error: float  # ‖sparse - wanted output‖² / ‖wanted‖²


@torch.no_grad()
def calibrate(
    model,
    token_ids,
    target_active: float = 0.5,
    expert_size: int = 16,
    shared: float = 0.25,
    refit: bool = True,
    *,
    window: int = 512,
    seed: int = 0,
    progress: bool = True,
):
    """Makes a dense model sparse in closed form, without training -> a model of its class.

    model: a dense transformers model with gated MLPs, or a sparse one (whose cut and routers are
        replaced). It stays as it is; the result shares its attention weights and embeddings (see
        sparsify).
    token_ids: text like that which the model will see: int64 [N,L] windows, or [n] tokens, which
        are cut into windows of `window`. Quality grows with it, up to some 30,000 tokens; time and
        memory are proportional to it.
    target_active: the share of the FFN that is on for the average token, shared part included.
    expert_size: neurons of a routed expert; 16 is best, 32 nearly so, and both suit the kernels.
    shared: the share of the FFN that is always on. It grows by what expert_size does not divide.
    refit: also refit down_proj to the masks. Without, merge gives the dense weights back
        bit for bit.
    seed: of the grouping. The same seed, text, machine and thread count give the same bits.
    progress: show a progress bar on stderr.

    The result has binary gates and no rescaling; config.dsmoe["target_active"] is set for training.
    Besides the models it needs (I + 5 H + 3 R) · T + 6 I² floats for T tokens, whatever the number
    of layers: 0.4 GB for 16,384 tokens of SmolLM2-135M.
    """
    dense, kept = _dense_model(model)
    sizes = partition.shared_split(_intermediate_size(dense), expert_size, shared)
    layout = Layout(*sizes)
    windows = _check_windows(token_ids, dense, window)
    _check_target(target_active, layout)
    _warn_of_many_experts(len(sizes[1]) + (sizes[0] > 0))
    training = dense.training
    dense.eval()
    fits = []
    num_layers = len(gated_mlps(text_model(dense)))
    bar = console.progress("Calibrating", num_layers, "layers") if progress else _no_progress()
    try:
        with quick_matmul(), bar as advance:
            streams = Streams(dense, windows.to(dense.device))
            for index, layer in enumerate(streams.layers):
                if layer.mlp_name is None:
                    streams.enter(layer)
                    continue
                fits.append(fit_layer(streams, layer, layout, target_active, refit, seed + index))
                advance(1, note=f"layer error {fits[-1].error:.3f}")
    finally:
        dense.train(training)
    return _assemble(dense, layout, target_active, fits, kept).train(training)


def _warn_of_many_experts(num_experts: int) -> None:
    """Before the work is done: the default cut of Llama-2-7B has 517 experts."""
    most = build_info()["max_cuda_experts"]
    if num_experts > most and torch.cuda.is_available():
        warnings.warn(
            f"{num_experts} experts a layer are more than the {most} that CUDA kernels take: the "
            "result will run on the CPU only. A larger expert_size makes fewer.",
            stacklevel=3,
        )


def fit_layer(
    streams: Streams, layer: Layer, layout: Layout, target: float, refit: bool, seed: int
) -> LayerFit:
    """Finds one layer's order, router and weights, and moves both streams behind the layer."""
    # The dense stream runs on; the sparse one waits for its FFN's output until that is known.
    layer = streams.enter(layer)
    found = layer.found
    weights = found.weights(layer.mlp)
    down_proj_t = weights[-1].T.contiguous()  # [I,H]
    x = streams.x.flatten(0, 1)  # [T,H]
    hidden = x.new_empty(len(x), layout.intermediate_size)
    for _, rows in streams.token_rows():
        hidden[rows] = mlp_activations(x[rows], weights, found.activation)
    order, weight, bias, on = _fit_routing(x, hidden, down_proj_t, layout, target, seed)

    # x's memory now takes the wanted output: this layer's own on what it sees, and a part of what
    # is still missing from earlier layers.
    wanted, experts = x, experts_of_neurons(order, layout)
    for chunk, rows in streams.token_rows():
        own = hidden[rows] @ down_proj_t
        wanted[rows] = own.lerp_(streams.missing(chunk, own), CORRECTION) if refit else own
        switch_off(hidden[rows], on[rows], experts)
    if refit:
        down_proj_t = refit_down_proj(hidden, wanted, down_proj_t)
    output = hidden @ down_proj_t
    streams.leave(lambda rows: output[rows])
    power = wanted.square().sum().clamp(min=1e-30)
    error = wanted.sub_(output).square().sum() / power
    return LayerFit(
        order, SCALE * weight, SCALE * bias, down_proj_t[order] if refit else None, error.item()
    )


def _fit_routing(x, hidden, down_proj_t, layout: Layout, target: float, seed: int):
    """(order [I], router weight [R,H], bias [R], on [T,R] bool) from x [T,H], hidden [T,I]."""
    statistics = InputStatistics.of(x)
    strength = down_proj_t.norm(dim=1)  # [I]
    sample = slice(None, None, max(1, len(x) // GROUPING_TOKENS))
    order = group_neurons(
        hidden[sample].abs() * strength, x[sample], statistics.cholesky, layout, seed
    )
    norms = expert_norms(hidden, strength, experts_of_neurons(order, layout), layout)
    weight, bias = fit_router(x, norms, statistics)
    predicted = torch.addmm(bias, x, weight.T, out=norms)  # [T,R]
    threshold = quantile_threshold(predicted, layout.expert_sizes, layout.routed_share(target))
    return order, weight, bias - threshold, predicted > threshold


def _assemble(dense, layout: Layout, target: float, fits: list[LayerFit], kept: dict):
    """sparsify with each layer's order, then routers and refitted weights."""
    sparse = sparsify(
        dense,
        expert_sizes=layout.expert_sizes,
        shared_size=layout.shared_size,
        permutations=[fit.order for fit in fits],
        gates="binary",
        rescale=False,
        target_active=target,
        **kept,
    )
    for ffn, fit in zip(ffn_layers(sparse), fits, strict=True):
        ffn.router.weight.copy_(fit.router_weight)
        ffn.router.bias.copy_(fit.router_bias)
        if fit.down_proj_t is not None:
            ffn.expert_weights()[-1].copy_(fit.down_proj_t)
    return sparse


def _dense_model(model):
    """(the dense model, what a converted one keeps of its configuration)."""
    if isinstance(model, nn.Module) and find_ffns(model):
        names = ("ste", "sample_prob", "seed", "sparsity_weight")
        options = options_of(model)
        return merge(model), {name: options[name] for name in names}
    check_dense(model)
    return model, {}


def _intermediate_size(dense) -> int:
    mlps = gated_mlps(text_model(dense)).items()
    sizes = {describe(mlp).intermediate_size: name for name, mlp in mlps}
    if len(sizes) > 1:
        names = " and ".join(f"{name} ({size})" for size, name in list(sizes.items())[:2])
        raise ValueError(f"calibrate() needs MLPs of one size, but {names} differ")
    return next(iter(sizes))


def _check_windows(token_ids, dense, window: int) -> Tensor:
    ids = torch.as_tensor(token_ids)
    if ids.is_floating_point() or ids.dim() not in (1, 2):
        raise ValueError(
            f"token_ids must be integers of shape [n] or [N,L], got {ids.dtype} {list(ids.shape)}"
        )
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    ids = ids.long()  # token files often hold uint16, which torch can hardly compute with
    if ids.dim() == 1:
        ids = ids[: len(ids) // window * window].view(-1, window)
    config = dense.config.get_text_config(decoder=True)
    needed = config.hidden_size + 1
    if ids.numel() < needed:
        raise ValueError(
            f"{ids.numel()} tokens in whole windows are too few to calibrate on: with hidden size "
            f"{needed - 1} the routers need at least {needed}, and a good result some 16,000"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"token_ids must lie in 0 to {config.vocab_size - 1}, got {low} to {high}")
    return ids.long()


def _check_target(target: float, layout: Layout) -> None:
    share = layout.shared_size / layout.intermediate_size
    if not share < target <= 1:
        raise ValueError(
            f"target_active={target} counts the shared part, so it must lie above that "
            f"({share:.3f}) and be 1 at most"
        )


@contextlib.contextmanager
def _no_progress():
    yield lambda *_, **__: None
