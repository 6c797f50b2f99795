"""calibrate: the loop over the layers, and the sparse model made of what it found."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dsmoe_ext import partition
from dsmoe_ext.calibration.choice import (
    METHODS,
    Choice,
    by_mean_gate,
    choose,
    options_of_method,
)
from dsmoe_ext.calibration.dense_ffn import Chunks, DenseFFN
from dsmoe_ext.calibration.neurons import (
    Layout,
    expert_norms,
    experts_of_neurons,
    group_neurons,
    switch_off,
)
from dsmoe_ext.calibration.refit import refit_down_proj
from dsmoe_ext.calibration.router import fit_router, log_strength
from dsmoe_ext.calibration.streams import Streams, quick_matmul
from dsmoe_ext.calibration.sums import Moments
from dsmoe_ext.command_line import console
from dsmoe_ext.convert import check_dense, check_finite, merge, refuse_offloaded, sparsify
from dsmoe_ext.gated_mlp import kind_of
from dsmoe_ext.layers import ffn_layers, find_ffns
from dsmoe_ext.layout import expert_layout, parse_sizes
from dsmoe_ext.models.adopt import gated_mlps, text_model
from dsmoe_ext.models.options import options_of
from dsmoe_ext.ops import build_info

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The neurons are grouped on at most this many of the tokens.
GROUPING_TOKENS = 16384
# How much of the error that earlier layers left in the hidden state a layer's refit takes on.
CORRECTION = 0.5


class Fit(Protocol):
    """What takes the place of a dense FFN."""

    def output(self, ffn: DenseFFN, x: Tensor) -> Tensor:
        """[t,H] of x [t,H]; ffn: the dense one whose place it takes."""


AnyFit = TypeVar("AnyFit", bound=Fit)


@dataclass(frozen=True)
class LayerFit:
    """What makes one dense FFN sparse."""

    order: Tensor  # int64 [I]: the neurons, shared first, then expert after expert
    experts: Tensor  # int64 [I]: the routed expert of every neuron, R for the shared ones
    choice: Choice  # which experts are on
    down_proj_t: Tensor  # [I,H], neurons in the dense model's order
    error: float  # ‖sparse - wanted output‖² / ‖wanted‖²

    def output(self, ffn: DenseFFN, x: Tensor) -> Tensor:
        """The sparse FFN's output [t,H] of x [t,H]."""
        hidden = ffn.activate(x)
        switch_off(hidden, self.choice.active(x), self.experts)
        return ffn.output(hidden, self.down_proj_t)


@torch.no_grad()
def calibrate(
    model: "PreTrainedModel",
    token_ids: Any,
    target_active: float = 0.5,
    expert_size: int = 16,
    shared: float = 0.25,
    refit: bool = True,
    *,
    expert_sizes: Sequence[int | float] | str | None = None,
    method: str = "threshold",
    window: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> "PreTrainedModel":
    """Makes a dense model sparse in closed form, without training -> a model of its class.

    model: a dense transformers model with gated MLPs, or a sparse one (whose cut and routers are
        replaced). It stays as it is; the result shares its attention weights and embeddings (see
        sparsify).
    token_ids: text like that which the model will see: int64 [N,L] windows, or [n] tokens, which
        are cut into windows of `window`. Quality grows with it; time is proportional to it.
    target_active: the share of the FFN that is on for the average token, shared part included.
        Where it equals `shared`, no routed expert is ever on: a pruned model, without routing.
    expert_size: neurons of a routed expert; 16 is best, 32 nearly so, and both suit the kernels.
    shared: the share of the FFN that is always on. It grows by what expert_size does not divide.
    expert_sizes: of the routed experts, in place of expert_size: neurons that sum up, ratios, or as
        the command line writes them ("pairs:4.5,0.5;4,1", layout.parse_sizes).
    refit: also refit down_proj to the masks. Without, merge gives the dense weights back
        bit for bit.
    method: the router, "threshold", "top_p", "top_k" or "mean_score" (choice.py). The last two
        count experts: they meet the target to half an expert, and only if all have one size.
    seed: of the grouping. The same seed, text, machine and thread count give the same bits.
    progress: show a progress bar on stderr.

    The result has binary gates and no rescaling; config.dsmoe["target_active"] is set for training.
    Besides the models it needs sums of some 6 I² floats for one layer at a time, and the hidden
    states of the text, 3 H · T floats for T tokens: in memory up to states.IN_MEMORY bytes each,
    in temporary files beyond.
    """
    if method not in METHODS:
        raise ValueError(f"calibration knows {', '.join(METHODS)}, but not {method!r}")
    refuse_offloaded(model)
    check_finite(model)
    dense, kept = _dense_model(model)
    layout = layout_of(dense, target_active, expert_size, expert_sizes, shared)
    windows = _check_windows(token_ids, dense, window)
    _warn_of_many_experts(len(layout.expert_sizes) + (layout.shared_size > 0))
    num_layers = len(gated_mlps(text_model(dense)))
    bar = console.progress("Calibrating", num_layers, "layers") if progress else _no_progress()
    with bar as advance:

        def fit(ffn: DenseFFN, chunks: Chunks, index: int) -> LayerFit:
            options = (method, layout, target_active, refit, seed + index)
            found = fit_layer(ffn, chunks, *options)
            advance(1, note=f"layer error {found.error:.3f}")
            return found

        fits = fit_layers(dense, windows, fit)
    sparse = _assemble(dense, method, layout, target_active, refit, fits, kept)
    return sparse.train(dense.training)


@torch.no_grad()
def fit_layers(
    dense: "PreTrainedModel", windows: Tensor, fit: Callable[[DenseFFN, Chunks, int], AnyFit]
) -> list[AnyFit]:
    """What fit(ffn, chunks, position of the layer in the stack) makes of every dense FFN, first
    layer first, on the text windows [N,L]: each sees what those before it leave."""
    training = dense.training
    dense.eval()
    fits = []
    try:
        # Autocast would round what the sums are of; the fits choose their own precision.
        with torch.autocast(dense.device.type, enabled=False), quick_matmul():
            streams = Streams(dense, windows.to(dense.device))
            for index, layer in enumerate(streams.layers):
                # The dense stream runs on; the sparse one waits for its FFN's output.
                layer = streams.enter(layer)
                if layer.mlp_name is None:
                    continue
                ffn = DenseFFN(layer.found, layer.found.weights(layer.mlp))
                found = fit(ffn, functools.partial(_chunks, streams), index)
                streams.leave(functools.partial(found.output, ffn))
                fits.append(found)
    finally:
        dense.train(training)
    return fits


def _chunks(streams: Streams) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    for chunk in streams.chunks:
        x = streams.x.read(chunk).flatten(0, 1)
        yield x, functools.partial(streams.missing, chunk)


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
    ffn: DenseFFN,
    chunks: Chunks,
    method: str,
    layout: Layout,
    target: float,
    refit: bool,
    seed: int,
) -> LayerFit:
    """Finds one layer's order, router and weights, from sums over any number of tokens."""
    order = group_layer(ffn, chunks, layout, seed)
    experts = experts_of_neurons(order, layout)
    choice = choose_experts(ffn, chunks, method, layout, target, experts)
    if refit:
        down_proj_t, error = refit_layer(ffn, chunks, choice.active, experts)
    else:
        down_proj_t, error = ffn.down_proj_t, _error(ffn, chunks, choice.active, experts)
    return LayerFit(order, experts, choice, down_proj_t, error)


def grouping_inputs(chunks: Chunks) -> Iterator[Tensor]:
    """The FFN's inputs x [t,H] for the tokens that neurons are grouped on."""
    left = GROUPING_TOKENS
    for x, _ in chunks():
        yield x[:left]
        left -= len(x)
        if left <= 0:
            return


def group_layer(ffn: DenseFFN, chunks: Chunks, layout: Layout, seed: int) -> Tensor:
    """The order of the neurons int64 [I] (neurons.group_neurons)."""
    seen = Moments()
    for x in grouping_inputs(chunks):
        seen.add(x, ffn.activate(x).to(x.dtype).abs_().mul_(ffn.strength))
    return group_neurons(seen, layout, seed)


def choose_experts(
    ffn: DenseFFN, chunks: Chunks, method: str, layout: Layout, target: float, experts: Tensor
) -> Choice:
    """The router of experts int64 [I], by the method."""
    if method == "mean_score":
        return by_mean_gate(ffn.gate_proj, experts, layout, target)
    logs = Moments()
    for x, _ in chunks():
        norms = expert_norms(ffn.activate(x), ffn.strength, experts, layout).to(x.dtype)
        logs.add(x, log_strength(norms))
    predicted = fit_router(logs, ffn.down_proj_t.dtype)
    return choose(method, predicted, logs, lambda: (x for x, _ in chunks()), layout, target)


def refit_layer(
    ffn: DenseFFN, chunks: Chunks, active: Callable[[Tensor], Tensor], experts: Tensor
) -> tuple[Tensor, float]:
    """(down_proj_t [I,H] refitted to the masks active(x) [t,R], the relative error left)."""
    sums = Moments(centred=False)
    for x, missing in chunks():
        hidden = ffn.activate(x)
        # Wanted: the layer's own dense output on what it sees, and a part of what is still missing
        # from earlier layers.
        wanted = ffn.output(hidden)
        wanted = wanted.lerp(missing(wanted), CORRECTION)
        switch_off(hidden, active(x), experts)
        sums.add(hidden.to(x.dtype), wanted)
    return refit_down_proj(sums, ffn.down_proj_t)


def _error(
    ffn: DenseFFN, chunks: Chunks, active: Callable[[Tensor], Tensor], experts: Tensor
) -> float:
    """‖sparse - dense output‖² / ‖dense output‖² of a layer with its dense weights."""
    lost, power = 0.0, 0.0
    for x, _ in chunks():
        hidden = ffn.activate(x).to(x.dtype)
        wanted = ffn.output(hidden)
        power += wanted.square().sum().item()
        switch_off(hidden, active(x), experts)
        lost += wanted.sub_(ffn.output(hidden)).square().sum().item()
    return lost / max(power, 1e-30)


def _assemble(
    dense: "PreTrainedModel",
    method: str,
    layout: Layout,
    target: float,
    refit: bool,
    fits: Sequence[LayerFit],
    kept: dict[str, Any],
) -> "PreTrainedModel":
    """sparsify with each layer's order, then routers and refitted weights."""
    sparse = sparsify(
        dense,
        expert_sizes=layout.expert_sizes,
        shared_size=layout.shared_size,
        permutations=[fit.order for fit in fits],
        gates="binary",
        rescale=False,
        **options_of_method(method, layout, target),
        **kept,
    )
    for ffn, fit in zip(ffn_layers(sparse), fits, strict=True):
        fit.choice.give_to(ffn)
        if refit:
            ffn.expert_weights()[-1].copy_(fit.down_proj_t[fit.order])
    return sparse


def _dense_model(model: "PreTrainedModel") -> tuple["PreTrainedModel", dict[str, Any]]:
    """(the dense model, what a converted one keeps of its configuration)."""
    if isinstance(model, nn.Module) and find_ffns(model):
        names = ("ste", "sample_prob", "seed", "sparsity_weight")
        options = options_of(model)
        return merge(model), {name: options[name] for name in names}
    check_dense(model)
    return model, {}


def _intermediate_size(model: "PreTrainedModel") -> int:
    if ffns := find_ffns(model):
        return ffns[0].intermediate_size
    check_dense(model)
    mlps = gated_mlps(text_model(model)).items()
    sizes = {kind_of(mlp).intermediate_size: name for name, mlp in mlps}
    if len(sizes) > 1:
        names = " and ".join(f"{name} ({size})" for size, name in list(sizes.items())[:2])
        raise ValueError(f"calibrate() needs MLPs of one size, but {names} differ")
    return next(iter(sizes))


def layout_of(
    model: "PreTrainedModel",
    target_active: float = 0.5,
    expert_size: int = 16,
    expert_sizes: Sequence[int | float] | str | None = None,
    shared: float = 0.25,
) -> Layout:
    """How calibrate() would cut a model, dense or sparse; ValueError where it could not."""
    neurons = _intermediate_size(model)
    if expert_sizes is None:
        layout = Layout(*partition.shared_split(neurons, expert_size, shared))
    else:
        if not 0 <= shared < 1:
            raise ValueError(f"shared must be at least 0 and below 1, not {shared}")
        size = round(shared * neurons)
        if isinstance(expert_sizes, str):
            expert_sizes = parse_sizes(expert_sizes, neurons - size)
        sizes = expert_layout(neurons, expert_sizes=expert_sizes, shared_size=size)
        layout = Layout(size, sizes[1:] if size else sizes)
    _check_target(target_active, layout)
    return layout


def _check_windows(token_ids: Any, dense: "PreTrainedModel", window: int) -> Tensor:
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
    if not share <= target <= 1:
        raise ValueError(
            f"target_active={target} counts the shared part, so it must not lie below that "
            f"({share:.3f}) and be 1 at most"
        )


@contextlib.contextmanager
def _no_progress() -> Iterator[Callable[..., None]]:
    yield lambda *_, **__: None
