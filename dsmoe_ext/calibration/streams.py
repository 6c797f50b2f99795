"""The calibration text on its way through any model, one layer at a time.

Two hidden states are carried from layer to layer: that of the dense model, which says what each
layer should give, and that of the model made sparse so far, which is what the next layer will
really see. The model's own layers do the work: how the model calls them (masks, rotary embeddings)
is recorded once, and a layer is then called again with another hidden state and with something else
in place of its MLP's output.

How that output v enters the hidden state, layer(v) - layer(0), is tried out:
    m v                LLaMA, Qwen, Phi-3 (m = 1), Granite (residual_multiplier), Cohere (parallel)
    w v / rms(v)       Gemma 2 and 3, OLMo 2, GLM-4, EXAONE 4: a norm behind the MLP
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_ext.calibration.states import States
from dsmoe_ext.gated_mlp import GatedMLP, kind_of
from dsmoe_ext.models.adopt import gated_mlps, text_model
from dsmoe_ext.routers.interface import at_least_float32
from dsmoe_ext.training.evaluate import supports_bf16

# Tokens per chunk: temporaries are a few [CHUNK, I] matrices, and GEMMs of this height run at full
# speed.
CHUNK_TOKENS = 4096


class _Stop(Exception):
    """Enough has been seen of a forward."""


@dataclass
class Layer:
    """A layer of the stack, and how the model calls it."""

    module: nn.Module
    mlp_name: str | None  # of its gated MLP; None: this layer has none, and stays as it is
    calls: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # batch size -> (args, kwargs)

    @property
    def mlp(self) -> nn.Module:
        assert self.mlp_name is not None
        return getattr(self.module, self.mlp_name)

    @property
    def found(self) -> GatedMLP:
        return kind_of(self.mlp)

    def __call__(self, state: Tensor) -> Tensor:
        """The layer's output [n,L,H] of a hidden state [n,L,H]."""
        args, kwargs = self.calls[len(state)]
        args, kwargs = (state, *args[1:]), kwargs
        if not self.calls[len(state)][0]:
            args, kwargs = (), kwargs | {"hidden_states": state}
        out = self.module(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def with_mlp(self, state: Tensor, mlp: Callable[[Tensor], Tensor]) -> Tensor:
        """The same with another function in place of the MLP."""
        self.mlp.forward = mlp
        try:
            return self(state)
        finally:
            del self.mlp.forward


@dataclass(frozen=True)
class Residual:
    """What layer(v) - layer(0) is of the MLP's output v."""

    is_normed: bool
    factor: float | Tensor  # m, or w [H]

    def wanted(self, target: Tensor, own: Tensor) -> Tensor:
        """The v that adds target [T,H]; behind a norm, where any length would, that of own."""
        if not self.is_normed:
            return target if self.factor == 1.0 else target / self.factor
        factor = torch.as_tensor(self.factor)
        v = target / torch.where(factor == 0, 1.0, factor)
        return v * own.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True).clamp(min=1e-30)


class Streams:
    """dense, sparse: the two hidden states, float32 (float64 for such a model).

    `enter(layer)` brings both behind the layer, the sparse one without its MLP, whose input is then
    in x. `leave` adds what the sparse MLP gives. `chunks` are slices of the windows.
    """

    def __init__(self, model: nn.Module, windows: Tensor):
        self.model = text_model(model)
        self.dtype = at_least_float32(self.model.dtype)
        self.layers = _layers(self.model)
        step = max(1, CHUNK_TOKENS // windows.shape[1])
        self.chunks = [slice(i, i + step) for i in range(0, len(windows), step)]
        first = self._first_input(windows[:1])  # `_probe` calls layers on one window
        shape = (len(windows), *first.shape[1:])
        self.dense, self.sparse, self.x = (
            States(shape, self.dtype, first.device) for _ in range(3)
        )
        for chunk in self.chunks:
            first = self._first_input(windows[chunk])
            self.dense.write(chunk, first)
            self.sparse.write(chunk, first)

    def _first_input(self, windows: Tensor) -> Tensor:
        """Records how the layers are called for so many windows; the first one's hidden state."""
        first, size = [], len(windows)

        def record(layer: Layer, args: Any, kwargs: Any) -> Tensor:
            state = args[0] if args else kwargs["hidden_states"]
            first.append(state)
            layer.calls[size] = (args[:1] and (None, *args[1:]), dict(kwargs))
            if layer is self.layers[-1]:
                raise _Stop
            return state

        embeddings = self.model.get_input_embeddings()(windows).to(self.dtype)
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                layer.module.forward = lambda *args, layer=layer, **kw: record(layer, args, kw)
                stack.callback(delattr, layer.module, "forward")
            with contextlib.suppress(_Stop):
                self.model(inputs_embeds=embeddings, use_cache=False)
        return first[0].clone()

    def enter(self, layer: Layer) -> Layer:
        """Moves both states; the layer itself, or a float32 copy of one in half precision."""
        if next(layer.module.parameters()).dtype != self.dtype:
            module = copy.deepcopy(layer.module).to(self.dtype)
            layer = Layer(module, layer.mlp_name, layer.calls)
        for chunk in self.chunks:
            self.dense.write(chunk, layer(self.dense.read(chunk)))
        if layer.mlp_name is None:
            for chunk in self.chunks:
                self.sparse.write(chunk, layer(self.sparse.read(chunk)))
            return layer
        self.layer, self.residual = layer, _probe(layer, self.sparse.read(slice(0, 1)))
        self.before = None
        if self.residual is None or self.residual.is_normed:
            self.before = States(self.sparse.shape, self.dtype, self.sparse.device)
        for chunk in self.chunks:
            before = self.sparse.read(chunk)
            if self.before is not None:
                self.before.write(chunk, before)

            def nothing(x: Tensor, chunk: slice = chunk) -> Tensor:
                self.x.write(chunk, x)
                return torch.zeros_like(x)

            self.sparse.write(chunk, layer.with_mlp(before, nothing))
        return layer

    def leave(self, output: Callable[[Tensor], Tensor]) -> None:
        """Adds what the sparse MLP gives, output(x [t,H]) [t,H]."""
        for chunk in self.chunks:
            x = self.x.read(chunk)
            v = output(x.flatten(0, 1)).view_as(x)
            if self.before is None:
                assert self.residual is not None
                after = self.sparse.read(chunk) + self.residual.factor * v
            else:  # once more through the layer: exact whatever becomes of v there

                def given(x: Tensor, v: Tensor = v) -> Tensor:
                    return v

                after = self.layer.with_mlp(self.before.read(chunk), given)
            self.sparse.write(chunk, after)

    def missing(self, chunk: slice, own: Tensor) -> Tensor:
        """What the MLP would have to give [t,H] for the sparse state to become the dense one; own
        [t,H], what it gives, where it cannot be told."""
        if self.residual is None:
            return own
        target = (self.dense.read(chunk) - self.sparse.read(chunk)).flatten(0, 1)
        return self.residual.wanted(target, own)


def _layers(model: nn.Module) -> list[Layer]:
    """All layers of the stack that holds the gated MLPs."""
    names = [name.rpartition(".") for name in gated_mlps(model)]
    stack = names[0][0].rpartition(".")[0]
    mlps = {layer: mlp for layer, _, mlp in names}
    if any(layer.rpartition(".")[0] != stack for layer in mlps):
        raise ValueError(f"{type(model).__name__} has gated MLPs in more than one stack of layers")
    return [
        Layer(module, mlps.get(f"{stack}.{index}" if stack else index))
        for index, module in model.get_submodule(stack).named_children()
    ]


def _probe(layer: Layer, state: Tensor) -> Residual | None:
    """Tries how the MLP's output enters the hidden state; None: in neither of the known ways."""

    def given(v: Tensor) -> Tensor:
        return layer.with_mlp(state, lambda _: v)

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(state.shape, generator=generator, dtype=state.dtype).to(state.device)
    # Neither lost in the rounding of the state, nor so small that a norm's epsilon shows.
    v *= state.square().mean().sqrt().clamp(min=1.0)
    nothing = given(torch.zeros_like(v))
    once, twice = given(v) - nothing, given(2 * v) - nothing
    factor = ((once * v).sum() / v.square().sum()).item()
    tolerance = 1e-3 * once.abs().max()
    is_linear = (once - factor * v).abs().max() <= tolerance
    if is_linear and (twice - 2 * once).abs().max() <= 2 * tolerance:
        return Residual(False, round(factor, 6))
    if (twice - once).abs().max() <= tolerance:
        weight = once / v * v.square().mean(-1, keepdim=True).sqrt()
        weight = weight.flatten(0, -2).median(0).values
        guess = weight * v / v.square().mean(-1, keepdim=True).sqrt()
        if (guess - once).abs().max() <= tolerance:
            return Residual(True, weight)
    return None


def quick_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute activations in, where sums over them are kept in `dtype`.

    bf16 where the processor has fast products for it (AMX: some three times as fast as float32,
    elementwise steps twice): the model itself is often run in bf16.
    """
    is_quick = dtype == torch.float32 and device.type == "cpu" and supports_bf16(device)
    return torch.bfloat16 if is_quick else dtype


@contextlib.contextmanager
def quick_matmul() -> Iterator[None]:
    """Lets float32 GEMMs on the CPU take the faster of torch's two libraries; restored afterwards.

    On AMD, oneDNN's float32 GEMM is twice as fast as MKL's and as accurate; this setting selects
    it. With AMX it allows bf16 products, which a regression on this much data does not notice: sums
    stay float32, and the systems are solved in float64. A GPU's setting is left as it is.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 (not in its types)
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
