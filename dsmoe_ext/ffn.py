"""DSMoEFFN: a LLaMA FFN cut into experts that a router switches on and off for every token.

    h = sum over experts e of gate_e * (silu(x Wgate_e) * (x Wup_e)) Wdown_e

The experts are slices of one dense FFN: with every gate at 1 the sum is exactly that FFN. Three
steps: router -> ops.route (scores, mask, gates) -> ops.sparse_ffn (only what the gates ask for).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsmoe_ext import ops
from dsmoe_ext.layout import expert_layout
from dsmoe_ext.llama_mlp import (
    check_llama_mlp,
    check_permutation,
    llama_mlp_from_weights,
    weights_from_llama_mlp,
)
from dsmoe_ext.ops import Routing
from dsmoe_ext.reference import GATES, METHODS
from dsmoe_ext.routers import ROUTERS, LinearRouter, without_half_casts
from dsmoe_ext.sampling import MIN_PROB, draw_weights, mix_key
from dsmoe_ext.statistics import ActivityCounter

STE_MODES = ("active", "exact", "sampled")
ROUTER_INITS = ("dense", "paper")
WEIGHTS = ("gate_proj", "up_proj", "down_proj_t")


def check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def dense_start(method: str, threshold: float, num_experts: int, top_k: int) -> tuple[float, float]:
    """Logit and unscaled gate that every expert starts with under router_init="dense"."""
    if method == "threshold":
        if not 0 <= threshold < 1:
            raise ValueError(f"router_init='dense' needs a threshold in [0, 1), got {threshold}")
        score = (threshold + 1) / 2  # half way between tau and 1: room to move on both sides
        return math.log(score / (1 - score)), score
    return {"relu": (1.0, 1.0), "top_p": (0.0, 1 / num_experts), "top_k": (0.0, 1 / top_k)}[method]


class DSMoEFFN(nn.Module):
    """Drop-in for LLaMA's MLP: x [..., H] -> [..., H].

    Parameters (of the model's dtype): gate_proj, up_proj, down_proj_t [I,H], expert after expert,
    the shared one first; router.weight [R,H] and router.bias [R] (float32). Buffers:
    expert_offsets int32 [E+1]; permutation int64 [I]: row i here is neuron permutation[i] of the
    LLaMA MLP; threshold fp32 0-d; draw_counter int64 0-d.

    num_experts   routed experts of equal size, or
    expert_sizes  their sizes (ints) or ratios (floats)
    shared_size   neurons of an always-on expert in front of them; 0: none
    threshold     tau of method "threshold", probability mass of "top_p"; move it any time
    method        "threshold" (DSMoE), "top_p" (XMoE), "top_k" (MoDSE, LLaMA-MoE), "relu" (ReMoE)
    gates         "scores" or "binary"
    rescale       multiply by I_routed / I_active; by default for scores, not for binary gates
    router        "linear" or "modse"; router_bias defaults to what router_init needs
    router_init   "dense": every expert starts active with gate 1, so that the layer starts as the
                  dense FFN; "paper": random. gate_scale follows from it unless given.
    ste           what inactive pairs tell the router: "active" nothing, "exact" all (the paper),
                  "sampled" an unbiased part of it: each pair with probability sample_prob
    seed          of the draws of "sampled"; None: from torch's generator
    weights       the three [I,H] tensors to use as they are, instead of random ones
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int = 8,
        threshold: float = 0.5,
        *,
        expert_sizes=None,
        shared_size: int = 0,
        method: str = "threshold",
        top_k: int = 2,
        gates: str = "scores",
        rescale: bool | None = None,
        router: str = "linear",
        router_bias: bool | None = None,
        router_init: str = "dense",
        gate_scale: float | None = None,
        ste: str = "active",
        sample_prob: float = 0.25,
        seed: int | None = None,
        weights: Sequence[Tensor] | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_choice("method", method, METHODS)
        check_choice("gates", gates, GATES)
        check_choice("ste", ste, STE_MODES)
        check_choice("router", router, ROUTERS)
        check_choice("router_init", router_init, ROUTER_INITS)
        if not MIN_PROB <= sample_prob <= 1:
            raise ValueError(f"sample_prob must lie in [{MIN_PROB:.0e}, 1], got {sample_prob}")
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating point type, got {dtype}")
        sizes = expert_layout(intermediate_size, num_experts, expert_sizes, shared_size)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.shared_size = shared_size
        self.num_shared = 1 if shared_size else 0
        self.num_experts = len(sizes) - self.num_shared  # the routed ones, R
        if method == "top_k" and not 0 < top_k <= self.num_experts:
            raise ValueError(
                f"top_k must lie between 1 and the {self.num_experts} routed experts, got {top_k}"
            )
        self.method, self.top_k = method, top_k
        self.gates = gates
        self.rescale = gates == "scores" if rescale is None else rescale
        self.ste, self.sample_prob = ste, sample_prob
        self.set_seed(torch.randint(2**62, (), device="cpu").item() if seed is None else seed)

        shape = (intermediate_size, hidden_size)
        is_new = weights is None
        if is_new:
            weights = [torch.empty(shape, device=device, dtype=dtype) for _ in WEIGHTS]
        for name, weight in zip(WEIGHTS, weights, strict=True):
            if weight.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(weight.shape)}")
            parameter = nn.Parameter(weight, requires_grad=is_new or weight.requires_grad)
            self.register_parameter(name, parameter)
        self._init_router(router, router_init, router_bias, gate_scale, threshold, device, dtype)

        offsets = torch.tensor([0, *sizes], device=device).cumsum(0, dtype=torch.int32)
        self.register_buffer("expert_offsets", offsets)
        self.register_buffer("permutation", torch.arange(intermediate_size, device=device))
        self.register_buffer(
            "threshold", torch.tensor(threshold, dtype=torch.float32, device=device)
        )
        self.register_buffer("draw_counter", torch.zeros((), dtype=torch.int64, device=device))
        self.activity = ActivityCounter(len(sizes), device)
        self._packed: ops.PackedWeights | None = None
        if is_new:
            self.reset_parameters()

    def _init_router(self, router, router_init, bias, gate_scale, threshold, device, dtype) -> None:
        """Builds the router, and for a dense start the factor that makes its first gates 1."""
        logit, scale = None, 1.0
        if router_init == "dense":
            logit, score = dense_start(self.method, threshold, self.num_experts, self.top_k)
            scale = 1 / score if self.gates == "scores" else 1.0
            if logit and bias is False:
                raise ValueError("router_init='dense' needs a router bias: leave router_bias out")
        self.gate_scale = float(scale if gate_scale is None else gate_scale)
        bias = bool(logit) if bias is None else bias
        self.router = ROUTERS[router](
            self.hidden_size, self.num_experts, bias, device=device, dtype=dtype
        )
        self.router.start_at(logit)

    def reset_parameters(self) -> None:
        """Random expert weights as in nn.Linear."""
        for name in WEIGHTS:
            fan_in = self.intermediate_size if name == "down_proj_t" else self.hidden_size
            nn.init.uniform_(getattr(self, name), -(fan_in**-0.5), fan_in**-0.5)

    def set_seed(self, *parts: int) -> None:
        """Picks the stream of draws of ste="sampled". Layers must differ: pass (seed, layer).

        Draws shared between layers would correlate, and so bias, their router gradients.
        """
        self.draw_key = mix_key(*parts)

    # ------------------------------------------------------------ forward

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        draw: Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """x [..., H] -> y [..., H], or (y, Routing) with return_routing.

        Args:
            token_mask: [...] bool, False = padding, which the statistics leave out.
            draw: an earlier result of next_draw(), for callers that run the same forward twice.
            return_routing: return the routing instead of counting it; a caller that runs the same
                forward twice (gradient checkpointing) counts once itself, with activity.add.
        """
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"x must have shape [..., {self.hidden_size}], got {list(x.shape)}")
        tokens = x.reshape(-1, self.hidden_size)
        if self._can_run_packed(tokens) and not return_routing:
            y, gates = ops.routed_ffn(
                tokens,
                self.router.weight,
                self.router.bias,
                self.threshold,
                self._packed,
                **self.routing_options,
            )
            y = y.view(x.shape)
        else:
            gates, scores = ops.route(
                self.router(tokens), self.threshold, self.expert_offsets, **self.routing_options
            )
            y = self.run_experts(tokens, gates, draw).view(x.shape)
            if return_routing:
                return y, Routing(gates, scores)
        self.activity.add(gates, None if token_mask is None else token_mask.reshape(-1))
        return y

    @property
    def routing_options(self) -> dict:
        """The options of ops.route that this layer was made with."""
        return {
            "method": self.method,
            "top_k": self.top_k,
            "gates": self.gates,
            "rescale": self.rescale,
            "gate_scale": self.gate_scale,
        }

    def _can_run_packed(self, tokens: Tensor) -> bool:
        """Whether router, routing and experts can be one call, which saves 10 to 20 µs a token."""
        return (
            self._packed is not None
            and not torch.is_grad_enabled()
            and tokens.dtype == self._packed.dtype
            and type(self.router) is LinearRouter
        )

    def run_experts(self, tokens: Tensor, gates: Tensor, draw: Tensor | None = None) -> Tensor:
        """y [T,H] from tokens [T,H] and given gates [T,E]: the FFN without its router."""
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
        else:
            dtype = None
        if self._packed is not None and not torch.is_grad_enabled():
            return ops.sparse_ffn(
                tokens.to(self._packed.dtype) if dtype else tokens, gates, self._packed
            )
        # Read anew every time: LoRA and other parametrisations compute these on access.
        weights = (self.gate_proj, self.up_proj, self.down_proj_t)
        if dtype is not None and tokens.dtype != torch.float64:
            tokens, *weights = (tensor.to(dtype) for tensor in (tokens, *weights))
        grad_weight = self._grad_weight(gates, draw)
        return ops.sparse_ffn(tokens, gates, *weights, self.expert_offsets, grad_weight=grad_weight)

    def _grad_weight(self, gates: Tensor, draw: Tensor | None) -> Tensor | None:
        """The weights [T,E] of the inactive pairs' gradients; None: none of them has any."""
        if self.ste == "active" or not torch.is_grad_enabled() or not gates.requires_grad:
            return None
        if self.ste == "exact" or not self.training:  # evaluation draws nothing: its mean is exact
            return torch.ones_like(gates, requires_grad=False)
        draw = self.next_draw() if draw is None else draw
        return draw_weights(self.draw_key, draw, *gates.shape, self.sample_prob).to(gates.dtype)

    def next_draw(self) -> Tensor:
        """Takes the next position in this layer's stream of draws: int64 0-d.

        Only the backward uses a draw, and it uses exactly one: under gradient checkpointing that of
        the recomputation, whose sparse_ffn is the one that is differentiated. So a fresh draw there
        is as unbiased as the first. Passing the draw in (as DSMoELlamaModel does) makes it the same
        one, and the gradients equal to those without checkpointing, bit for bit.
        """
        draw = self.draw_counter.clone()
        self.draw_counter += 1
        return draw

    # ------------------------------------------------------------ packing

    def pack(self) -> "DSMoEFFN":
        """Packs a copy of the weights for inference without gradients.

        train(), loading and moves undo it. Weights that are changed in place in eval mode (by an
        optimizer, an average of models) want to be packed again.
        """
        if self.training:
            raise RuntimeError("pack() is for inference; call eval() first")
        weights = (self.gate_proj.detach(), self.up_proj.detach(), self.down_proj_t.detach())
        self._packed = ops.pack_weights(*weights, self.expert_offsets)
        return self

    def train(self, mode: bool = True):
        if mode:
            self._packed = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._packed = None
        threshold = without_half_casts(fn)(self.threshold).float()
        super()._apply(fn, recurse)
        self.threshold = threshold
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self._packed = None
        # What save_pretrained writes has LLaMA's names, and transformers.Trainer resumes from it
        # with load_state_dict. Without a permutation beside them, LLaMA's order is meant as well.
        is_permuted = f"{prefix}permutation" in state_dict
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = state_dict.pop(f"{prefix}{name}.weight", None)
            if weight is not None:
                rows = weight.t().contiguous() if name == "down_proj" else weight
                rows = rows if is_permuted else rows[self.permutation.to(rows.device)]
                state_dict[prefix + name.replace("down_proj", "down_proj_t")] = rows
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_packed": None}

    # ------------------------------------------------------------ to and from LLaMA's MLP

    @classmethod
    def from_llama_mlp(
        cls,
        mlp: nn.Module,
        num_experts: int = 8,
        threshold: float = 0.5,
        *,
        permutation=None,
        **options,
    ) -> "DSMoEFFN":
        """The sparse FFN of a LlamaMLP (SiLU, no biases).

        Args:
            permutation: [I], neuron permutation[i] of the MLP becomes row i. Without one, gate_proj
                and up_proj share the MLP's memory.
            options: as for DSMoEFFN.
        """
        check_llama_mlp(mlp)
        intermediate_size, hidden_size = mlp.gate_proj.weight.shape
        device = mlp.gate_proj.weight.device
        if permutation is not None:
            permutation = check_permutation(permutation, intermediate_size, device)
        weights = weights_from_llama_mlp(mlp, permutation)
        options |= {"weights": weights, "device": device, "dtype": weights[0].dtype}
        ffn = cls(hidden_size, intermediate_size, num_experts, threshold, **options)
        if permutation is not None:
            ffn.permutation.copy_(permutation)
        return ffn.train(mlp.training)

    def to_llama_mlp(self, config=None) -> nn.Module:
        """The LlamaMLP (of a LlamaConfig, if given): from_llama_mlp undone, bit for bit."""
        weights = [getattr(self, name) for name in WEIGHTS]
        return llama_mlp_from_weights(config, weights, self.permutation).train(self.training)

    def extra_repr(self) -> str:
        sizes = [] if self.expert_offsets.is_meta else self.expert_offsets.diff().tolist()
        sizes = sizes[self.num_shared :]
        if len(set(sizes)) == 1:
            experts = f"{self.num_experts} x {sizes[0]}"
        else:
            experts = f"{self.num_experts} of sizes {sizes}"
        parts = [
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}",
            f"experts={experts}",
            f"shared_size={self.shared_size}" if self.shared_size else "",
            f"method={self.method}",
            f"top_k={self.top_k}" if self.method == "top_k" else "",
            "" if self.threshold.is_meta else f"threshold={self.threshold.item():.4g}",
            f"gates={self.gates}, rescale={self.rescale}, gate_scale={self.gate_scale:.4g}",
            f"ste={self.ste}",
        ]
        return ", ".join(part for part in parts if part)


def ffn_layers(model: nn.Module) -> list[DSMoEFFN]:
    """The model's DSMoEFFNs, first layer first; an error if it has none."""
    ffns = [module for module in model.modules() if isinstance(module, DSMoEFFN)]
    if not ffns:
        raise ValueError(
            f"{type(model).__name__} has no DSMoEFFN: convert it first (dsmoe_ext.convert_llama)"
        )
    return ffns


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Sets tau in every layer: fewer experts when raised, more when lowered, without retraining."""
    for ffn in ffn_layers(model):
        ffn.threshold.fill_(threshold)
