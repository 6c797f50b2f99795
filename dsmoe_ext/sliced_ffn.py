"""SlicedFFN: the weights of a gated FFN, cut into experts, and what can be done with them."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dsmoe_ext import ops
from dsmoe_ext.gated_mlp import SPLIT
from dsmoe_ext.quantization.codes import quantize_weights
from dsmoe_ext.quantization.experts import QuantizedExperts
from dsmoe_ext.quantization.gptq import quantize_with_gram
from dsmoe_ext.reference import split_weights
from dsmoe_ext.weights import FactoredWeight, Weight, permuted, replicated


class SlicedFFN(nn.Module):
    """An FFN whose gates are given: `run_experts`. DSMoEFFN makes them.

    sizes        neurons of every expert, in the order of the weights
    activation   "silu", "gelu_tanh" or "gelu"
    names        of the weights, which are submodules with a parameter `weight` each: gate and up
                 [I,H] and down [H,I], or gate and up in one [2I,H] and down
    weights      tensors in these shapes to use as they are; None: memory that somebody fills
    permutation  buffer int64 [I]: neuron i here is neuron permutation[i] of the dense MLP
    """

    permutation: Tensor

    def __init__(
        self,
        hidden_size: int,
        sizes: Sequence[int],
        *,
        activation: str = "silu",
        names: Sequence[str] = SPLIT,
        weights: Sequence[Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.sizes = list(sizes)
        self.hidden_size = hidden_size
        self.intermediate_size = sum(sizes)
        self.activation, self.names = activation, tuple(names)
        self._init_weights(weights, device, dtype)
        self.register_buffer("permutation", torch.arange(self.intermediate_size, device=device))
        self.experts: QuantizedExperts | None = None  # in place of the weights once quantized
        self.parallel: nn.Module | None = None  # likewise once they lie on several ranks
        self._offsets: Tensor | None = None
        self._packed: ops.PackedWeights | None = None
        self._pack_form: dict[str, Any] = {}  # what pack() was asked for, and of which weights
        self._packed_state: list[Any] = []

    def _init_weights(
        self,
        weights: Sequence[Tensor] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        height = self.intermediate_size * (2 if len(self.names) == 2 else 1)
        shapes = [(height, self.hidden_size)] * (len(self.names) - 1)
        shapes.append((self.hidden_size, self.intermediate_size))
        if weights is None:
            weights = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
            weights = [nn.Parameter(weight) for weight in weights]
        for name, shape, weight in zip(self.names, shapes, weights, strict=True):
            if weight.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(weight.shape)}")
            if not isinstance(weight, nn.Parameter):
                weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
            self.add_module(name, Weight(weight))

    @property
    def expert_offsets(self) -> Tensor:
        """int32 [E+1]: expert e has neurons expert_offsets[e]:expert_offsets[e+1]."""
        return self.offsets_on(self.permutation.device)

    def offsets_on(self, device: torch.device) -> Tensor:
        """expert_offsets on a device. Derived from the sizes, so in no checkpoint."""
        if device.type == "meta":
            device = torch.device("cpu")
        if self._offsets is None or self._offsets.device != device:
            with torch.inference_mode(False):  # or no later backward could keep it
                bounds = [0, *accumulate(self.sizes)]
                self._offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
        return self._offsets

    def expert_weights(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """gate [I,H], up [I,H] (None: both in gate [2I,H]) and down [I,H], as the kernels take
        them: views of the parameters. x: what adapters may want to look at. Of quantized experts
        copies, in float32."""
        if self.experts is not None:
            return self.experts.weights(self.offsets_on(torch.device("cpu"))).dequantize()
        if self.parallel is not None:
            raise RuntimeError(
                "the experts lie on several ranks: dsmoe_ext.distributed.whole first"
            )
        # Called, not read: offloading loads a weight in its module's forward, and LoRA changes it.
        *gate_up, down = (getattr(self, name)(x) for name in self.names)
        gate, up = gate_up if len(gate_up) == 2 else (gate_up[0], None)
        return gate, up, down.t()

    def run_experts(
        self, tokens: Tensor, gates: Tensor, grad_weight: Tensor | None = None
    ) -> Tensor:
        """y [T,H] from tokens [T,H] and given gates [T,E]. grad_weight: as in ops.sparse_ffn."""
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
        else:
            dtype = None
        packed = None if torch.is_grad_enabled() else self._current_pack()
        if packed is not None:
            return ops.sparse_ffn(tokens.to(packed.dtype) if dtype else tokens, gates, packed)
        if self.experts is not None:
            tokens = tokens.to(dtype) if dtype else tokens
            return self.experts.sparse_ffn(tokens, gates, self.expert_offsets, grad_weight)
        if self.parallel is not None:
            return self.parallel(tokens.to(dtype) if dtype else tokens, gates, grad_weight)
        gate, up, down = self.expert_weights(tokens)
        if dtype is not None and tokens.dtype != torch.float64:
            tokens, gate, down = tokens.to(dtype), gate.to(dtype), down.to(dtype)
            up = None if up is None else up.to(dtype)
        return ops.sparse_ffn(
            tokens,
            gates,
            gate,
            up,
            down,
            self.offsets_on(tokens.device),
            activation=self.activation,
            grad_weight=grad_weight,
        )

    def dense_weights(self) -> list[nn.Parameter]:
        """The weights in the dense MLP's order, under self.names: from_mlp undone, bit for bit."""
        self.refuse_adapters()
        if self.experts is not None:
            gate, up, down = self.experts.weights(self.offsets_on(torch.device("cpu"))).dequantize()
            gate_up = [torch.cat([gate, up])] if len(self.names) == 2 else [gate, up]
            weights = [nn.Parameter(weight) for weight in (*gate_up, down.t().contiguous())]
        else:
            weights = [getattr(self, name)() for name in self.names]
            if self.is_factored:
                weights = [nn.Parameter(weight.detach()) for weight in weights]
        order = self.permutation.to(weights[0].device).argsort()
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return weights
        return permuted(weights, order)

    def refuse_adapters(self) -> None:
        """Raises if something around a weight (LoRA) would be lost with its holder."""
        for name in self.names:
            holder = self._modules.get(name)
            if holder is not None and not isinstance(holder, Weight | FactoredWeight):
                raise ValueError(
                    f"{name} has an adapter ({type(holder).__name__}): merge it into the weights "
                    "first (PEFT's merge_and_unload)"
                )

    @property
    def num_expert_weights(self) -> int:
        """Of gate_proj, up_proj and down_proj, whether they are parameters or codes."""
        return 3 * self.hidden_size * self.intermediate_size

    # ------------------------------------------------------------ factors

    @property
    def is_factored(self) -> bool:
        """Whether the weights are a centre and residuals (offline/compress.py)."""
        return isinstance(self._modules.get(self.names[0]), FactoredWeight)

    def use_factors(self, sizes: Sequence[int], rank: int) -> None:
        """Puts memory for factors in the weights' place. sizes: of the shared part and of a routed
        expert, and the number of these."""
        self.refuse_adapters()
        for index, name in enumerate(self.names):
            weight = getattr(self, name).weight
            is_down = index == len(self.names) - 1
            parts = 0 if is_down else 2 if len(self.names) == 2 else 1
            kind = {"device": weight.device, "dtype": weight.dtype}
            setattr(self, name, FactoredWeight(parts, sizes, self.hidden_size, rank, **kind))
        self._packed = None

    # ------------------------------------------------------------ packing

    def pack(self, **form: Any) -> Self:
        """Packs a copy of the weights for inference without gradients.

        train(), loading and moves undo it. Weights that are changed in place meanwhile (an average
        of models, an adapter) are packed anew at the next call; what leaves no trace in a tensor's
        version, as fused optimizers and `.data` do, is not seen.

        Args:
            form: bits=8 or 4, group_size, symmetric: the copy is rounded (see ops.pack_weights).
                Quantized experts are packed as they are, and their codes move into the layout: to
                save or train them afterwards, load the model again.
        """
        if self.training:
            raise RuntimeError("pack() is for inference; call eval() first")
        if self.experts is not None:
            if form:
                raise ValueError(f"the experts have {self.experts.bits} bits already")
            if not self.experts.is_released:
                self._packed = ops.pack_quantized(self.experts.weights(self.expert_offsets))
                self.experts.release()
            return self
        if any(parameter.is_meta for parameter in self.parameters()):
            raise RuntimeError("the weights are offloaded: load the model whole, then pack it")
        gate, up, down = self.expert_weights()
        offsets = self.offsets_on(gate.device)
        self._pack_form, self._packed_state = form, self._weights_state()
        self._packed = ops.pack_weights(gate, up, down, offsets, activation=self.activation, **form)
        return self

    def _current_pack(self) -> ops.PackedWeights | None:
        """The packed weights, anew if the parameters have changed since."""
        if self._packed is None or self.experts is not None or torch.compiler.is_compiling():
            return self._packed
        if self._weights_state() != self._packed_state:
            self._packed = None  # its memory first
            self.pack(**self._pack_form)
        return self._packed

    def _weights_state(self) -> list[Any]:
        """What changes with the weights and their adapters: every tensor's memory and version."""
        tensors: list[Any] = []
        for name in self.names:
            holder: Any = self._modules[name]
            plain = type(holder) is Weight  # reading it so saves 3 us a weight
            tensors += (holder._parameters["weight"],) if plain else holder.parameters()
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    @torch.no_grad()
    def quantize(
        self,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool | None = None,
        *,
        grams: tuple[Tensor, Tensor] | None = None,
    ) -> "SlicedFFN":
        """Puts codes of 8 or 4 bits in place of the weights: for inference, frozen in training.

        Args:
            grams: xᵀx [H,H] of the inputs and aᵀa [I,I] of the activations on some text: rounding
                then makes up for its errors (GPTQ).
        """
        if self.experts is not None:
            raise ValueError(f"the experts have {self.experts.bits} bits already")
        self.refuse_adapters()
        form: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        weights = self.expert_weights()
        if weights[0].is_meta:  # of a model being built: a checkpoint has the codes
            experts = QuantizedExperts.empty(
                self.hidden_size, self.sizes, activation=self.activation, device="meta", **form
            )
        else:
            offsets = self.offsets_on(torch.device("cpu"))
            rows = split_weights(*weights)
            if grams is None:
                codes = quantize_weights(*rows, offsets, activation=self.activation, **form)
            else:
                codes = quantize_with_gram(
                    *rows, offsets, *grams, activation=self.activation, **form
                )
            experts = QuantizedExperts(codes)
        for name in self.names:
            delattr(self, name)
        self.experts, self._packed = experts, None
        return self

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._unpack()
        return super().train(mode)

    def _unpack(self) -> None:
        if self._packed is not None and self.experts is not None:
            self.experts.check_held()
        self._packed = None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Of a model sharded by FSDP2, loaders expect tensors on its mesh, also of buffers.
        mesh = getattr(next(self.parameters(), None), "device_mesh", None)
        if mesh is not None:
            for name in self._buffers:
                destination[prefix + name] = replicated(destination[prefix + name], mesh)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._packed = None
        for key in (prefix + name for name in self._buffers):
            if hasattr(state_dict.get(key), "device_mesh"):
                state_dict[key] = state_dict[key].to_local()
        state_dict.pop(f"{prefix}expert_offsets", None)  # of folders saved before 0.2: derived now
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}
