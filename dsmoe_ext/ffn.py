"""DSMoEFFN: a gated FFN cut into experts that a router switches on and off for every token.

    h = sum over experts e of gate_e * (act(x Wgate_e) * (x Wup_e)) Wdown_e

The experts are slices of one dense FFN: with every gate at 1 the sum is exactly that FFN. Three
steps: router -> ops.route (scores, mask, gates) -> ops.sparse_ffn (only what the gates ask for).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from dsmoe_ext import ops, sparsity
from dsmoe_ext.balance import BALANCE_FORMS, balance_terms
from dsmoe_ext.gated_mlp import SPLIT, describe
from dsmoe_ext.layout import expert_layout
from dsmoe_ext.ops import Routing
from dsmoe_ext.reference import ACTIVATIONS, GATES, METHODS
from dsmoe_ext.routers import LinearRouter, make_router, router_class, router_names
from dsmoe_ext.routers.interface import default_balance, without_half_casts
from dsmoe_ext.sampling import MIN_PROB, draw_weights, mix_key
from dsmoe_ext.sliced_ffn import SlicedFFN
from dsmoe_ext.statistics import ActivityCounter
from dsmoe_ext.weights import check_permutation, permuted

STE_MODES = ("active", "exact", "sampled")
ROUTERS = ("linear", "modse")
ROUTER_INITS = ("dense", "paper")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


class DSMoEFFN(SlicedFFN):
    """Drop-in for a gated MLP: x [..., H] -> [..., H].

    Parameters (of the model's dtype), with the dense model's names and shapes: gate_proj.weight and
    up_proj.weight [I,H], down_proj.weight [H,I], neurons expert after expert, the shared one first;
    router.weight [R,H] and router.bias [R] (float32). Buffers: permutation int64 [I]: neuron i here
    is neuron permutation[i] of the dense MLP; threshold fp32 0-d; draw_counter int64 0-d.

    num_experts   routed experts of equal size, or
    expert_sizes  their sizes (ints) or ratios (floats)
    shared_size   neurons of an always-on expert in front of them; 0: none
    threshold     tau of method "threshold", probability mass of "top_p"; move it any time
    method        "threshold" (DSMoE), "top_p" (XMoE), "top_k" (MoDSE, LLaMA-MoE), "relu" (ReMoE),
                  or the name of another registered router (docs/methods.md)
    gates         "scores" or "binary"
    rescale       multiply by I_routed / I_active; by default for scores, not for binary gates
    router        "linear" or "modse"; router_bias defaults to what router_init needs
    router_options  of a registered router, beyond those here
    balance       the form of balance_loss that takes the place of the sparsity loss; None: what
                  the registered router trains with, or the sparsity loss
    router_init   "dense": every expert starts active with gate 1, so that the layer starts as the
                  dense FFN; "paper": random. gate_scale follows from it unless given.
    ste           what inactive pairs tell the router: "active" nothing, "exact" all (the paper),
                  "sampled" an unbiased part of it: each pair with probability sample_prob
    seed          of the draws of "sampled"; None: from torch's generator
    activation    "silu", "gelu_tanh" or "gelu"
    names         of the weights: (gate, up, down), or (gate and up in one [2I,H], down)
    weights       tensors in these shapes to use as they are, instead of random ones
    """

    threshold: Tensor
    draw_counter: Tensor
    router: Any  # Router, of which each kind has attributes of its own
    _z3_leaf = True  # DeepSpeed's ZeRO-3 then gathers all weights of the module at once

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int = 8,
        threshold: float = 0.5,
        *,
        expert_sizes: Sequence[int | float] | None = None,
        shared_size: int = 0,
        method: str = "threshold",
        top_k: int = 2,
        gates: str = "scores",
        rescale: bool | None = None,
        router: str = "linear",
        router_bias: bool | None = None,
        router_options: dict[str, Any] | None = None,
        router_init: str = "dense",
        balance: str | None = None,
        gate_scale: float | None = None,
        ste: str = "active",
        sample_prob: float = 0.25,
        seed: int | None = None,
        activation: str = "silu",
        names: Sequence[str] = SPLIT,
        weights: Sequence[Tensor] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_choice("method", method, dict.fromkeys((*METHODS, *router_names())))
        check_choice("gates", gates, GATES)
        check_choice("ste", ste, STE_MODES)
        check_choice("router", router, ROUTERS)
        check_choice("router_init", router_init, ROUTER_INITS)
        check_choice("activation", activation, ACTIVATIONS)
        if not MIN_PROB <= sample_prob <= 1:
            raise ValueError(f"sample_prob must lie in [{MIN_PROB:.0e}, 1], got {sample_prob}")
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating point type, got {dtype}")
        super().__init__(
            hidden_size,
            expert_layout(intermediate_size, num_experts, expert_sizes, shared_size),
            activation=activation,
            names=names,
            weights=weights,
            device=device,
            dtype=dtype,
        )
        self.shared_size = shared_size
        self.num_shared = 1 if shared_size else 0
        self.num_experts = len(self.sizes) - self.num_shared  # the routed ones, R
        self.method = method
        self.ste, self.sample_prob = ste, sample_prob
        self.set_seed(int(torch.randint(2**62, (), device="cpu")) if seed is None else seed)
        if gates == "scores":
            gates = router_class(method).defaults.get("gates", gates)
        given = dict(threshold=threshold, top_k=top_k, gates=gates, gate_scale=gate_scale)
        given |= dict(bias=router_bias, noise=True if router == "modse" else None)
        given["rescale"] = gates == "scores" if rescale is None else rescale
        self.router = make_router(
            method,
            self.hidden_size,
            self.sizes,
            self.num_shared,
            given | (router_options or {}),
            is_dense_start=router_init == "dense",
            device=device,
            dtype=dtype,
        )
        self.gates = self.router.options.get("gates", gates)
        self.balance = balance or default_balance(method)
        if self.balance is not None:
            check_choice("balance", self.balance, BALANCE_FORMS)

        self.start_threshold = threshold
        self.register_buffer(
            "threshold", torch.tensor(threshold, dtype=torch.float32, device=device)
        )
        self.register_buffer("draw_counter", torch.zeros((), dtype=torch.int64, device=device))
        self.activity = ActivityCounter(len(self.sizes), device)
        if weights is None:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As it was made: random expert weights as in nn.Linear, the router and all buffers."""
        for name in self.names:
            weight = getattr(self, name).weight
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        if isinstance(self.router, LinearRouter):
            self.router.reset_parameters()
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(
        self, is_loaded: Callable[[Tensor], bool] = lambda tensor: tensor.is_meta
    ) -> None:
        """The buffers as they were made, but those that is_loaded."""
        for name, value in (
            ("permutation", torch.arange(self.intermediate_size, device="cpu")),
            ("threshold", torch.tensor(self.start_threshold, device="cpu")),
            ("draw_counter", torch.tensor(0, device="cpu")),
        ):
            if not is_loaded(getattr(self, name)):
                self._writable(name).copy_(value)

    def _writable(self, name: str) -> Tensor:
        """The buffer; a copy takes its place if it was made in inference mode, as that cannot be
        changed outside."""
        buffer = getattr(self, name)
        if torch.compiler.is_compiling():
            return buffer
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            buffer = buffer.clone()
            setattr(self, name, buffer)
        return buffer

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Moves tau (method "threshold") or the probability mass (method "top_p")."""
        if self.router.knob != "threshold":
            raise ValueError(f"method {self.method!r} has no threshold that could be moved")
        if not isinstance(threshold, Tensor) and not math.isfinite(threshold):
            raise ValueError(f"a threshold must be a finite number, got {threshold}")
        if self.threshold.is_meta:
            raise RuntimeError("the threshold is offloaded: load the model without offload_buffers")
        self._writable("threshold").copy_(torch.as_tensor(threshold))

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

        Inside a model the padding, the sparsity loss and gradient checkpointing are taken care of
        (sparsity.py); the arguments are for layers that stand alone.

        Args:
            token_mask: [...] bool, False = padding, which the statistics leave out.
            draw: an earlier result of next_draw(), for callers that run the same forward twice.
            return_routing: return the routing instead of counting it.
        """
        if x.shape[-1:] != (self.hidden_size,):
            raise ValueError(f"x must have shape [..., {self.hidden_size}], got {list(x.shape)}")
        tokens = x.reshape(-1, self.hidden_size)
        run = None if return_routing else sparsity.current()
        if token_mask is not None:
            token_mask = token_mask.reshape(-1)
        elif run is not None:
            token_mask = run.mask_of(tokens.shape[0])  # len() would fix it for torch.export
        packed = None if return_routing else self._pack_for_routing(tokens)
        if packed is not None:
            weight, bias = self.router.weights()
            y, gates = ops.routed_ffn(
                tokens,
                weight,
                bias,
                self.threshold,
                packed,
                **self.router.rule_options,
            )
        else:
            routing = self.route(tokens)
            gates = routing.gates
            if run is not None and draw is None and self.ste == "sampled" and self.training:
                draw = run.draw_of(self)
            y = self.run_experts(tokens, gates, self._grad_weight(gates, draw))
            if return_routing:
                return y.view(x.shape), routing
            if run is not None:
                y = run.note(self, y, routing)
        if run is None or not run.is_again:
            self.activity.add(gates, token_mask)
        return y.view(x.shape)

    def route(self, tokens: Tensor) -> Routing:
        """Gates [T,E] and scores [T,R] of tokens [T,H]."""
        if self.router.needs_gate_proj:
            gate_proj = self.expert_weights(tokens)[0][: self.intermediate_size]
            return self.router.pick(self.router(tokens, gate_proj), self.threshold)
        return self.router.pick(self.router(tokens), self.threshold)

    def loss_terms(self, routing: Routing, token_mask: Tensor | None = None) -> Tensor | None:
        """What training adds to the loss for each token, [T]: the terms of the balance loss, or of
        the sparsity loss; None: the method has neither."""
        if self.balance is not None:
            return balance_terms(routing, self.balance, token_mask=token_mask)
        if self.method not in METHODS:
            return None
        offsets = self.offsets_on(routing.gates.device)
        return sparsity.sparsity_terms(routing, offsets, self.gates == "binary")

    def turn(self, value: float) -> None:
        """Moves what trades quality for work: tau, the mass, k, or the router's own knob."""
        turn = self.set_threshold if self.router.knob in ("threshold", None) else self.router.turn
        turn(value)

    @property
    def knob(self) -> float:
        """What turn moves, as it is now."""
        name = self.router.knob
        if name is None:
            return math.nan
        return float(self.threshold if name == "threshold" else getattr(self.router, name))

    def _pack_for_routing(self, tokens: Tensor) -> ops.PackedWeights | None:
        """The packed weights where router, routing and experts can be one call, which saves 10 to
        20 µs a token."""
        if (
            self._packed is not None
            and not torch.is_grad_enabled()
            and self._packed.takes(tokens.dtype)
            and isinstance(self.router, LinearRouter)
            and self.router.is_plain
            and not self.router.weight.is_meta  # offloaded: the router must be called
        ):
            return self._current_pack()
        return None

    def _grad_weight(self, gates: Tensor, draw: Tensor | None) -> Tensor | None:
        """The weights [T,E] of the inactive pairs' gradients; None: none of them has any."""
        if self.ste == "active" or not torch.is_grad_enabled() or not gates.requires_grad:
            return None
        if self.ste == "exact" or not self.training:  # evaluation draws nothing: its mean is exact
            return torch.ones_like(gates, requires_grad=False)
        draw = self.next_draw() if draw is None else draw
        shape = len(gates), gates.shape[1]
        return draw_weights(self.draw_key, draw, *shape, self.sample_prob).to(gates.dtype)

    def next_draw(self) -> Tensor:
        """Takes the next position in this layer's stream of draws: int64 0-d.

        Only the backward uses a draw, and it uses exactly one: under gradient checkpointing that of
        the recomputation, whose sparse_ffn is the one that is differentiated. So a fresh draw there
        is as unbiased as the first. Inside a model it is the same one (ForwardPass.draw_of), and
        the gradients are equal to those without checkpointing, bit for bit.
        """
        counter = self._writable("draw_counter")
        draw = counter.clone()
        counter += 1
        return draw

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._unpack()
        threshold = without_half_casts(fn)(self.threshold).float()
        super()._apply(fn, recurse)
        self.threshold = threshold
        return self

    # ------------------------------------------------------------ to and from dense

    @classmethod
    def from_mlp(
        cls,
        mlp: nn.Module,
        num_experts: int = 8,
        threshold: float = 0.5,
        *,
        permutation: Tensor | Sequence[int] | None = None,
        **options: Any,
    ) -> "DSMoEFFN":
        """The sparse FFN of a gated MLP (gated_mlp.py says which modules are one).

        Args:
            permutation: [I], neuron permutation[i] of the MLP becomes neuron i. Without one the
                parameters are the MLP's own.
            options: as for DSMoEFFN.
        """
        found = describe(mlp)
        if found is None:
            raise TypeError(
                f"{type(mlp).__name__} is no gated MLP: it lacks linear layers "
                f"{', '.join(SPLIT)} (or others that gated_mlp.NAMES lists)"
            )
        weights = found.weights(mlp)
        # A model on the meta device gets its memory later, and whoever builds it says where.
        device = None if weights[0].is_meta else weights[0].device
        if permutation is not None:
            permutation = check_permutation(permutation, found.intermediate_size, device)
            weights = permuted(weights, permutation)
        ffn = cls(
            found.hidden_size,
            found.intermediate_size,
            num_experts,
            threshold,
            activation=found.activation,
            names=found.names,
            weights=weights,
            device=device,
            dtype=weights[0].dtype,
            **options,
        )
        if permutation is not None:
            ffn.permutation.copy_(permutation)
        return ffn.train(mlp.training)

    def extra_repr(self) -> str:
        sizes = self.sizes[self.num_shared :]
        if len(set(sizes)) == 1:
            experts = f"{self.num_experts} x {sizes[0]}"
        else:
            experts = f"{self.num_experts} of sizes {sizes}"
        parts = [
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}",
            f"experts={experts}",
            f"shared_size={self.shared_size}" if self.shared_size else "",
            f"method={self.method}",
            f"top_k={self.router.top_k}" if self.router.knob == "top_k" else "",
            "" if self.threshold.is_meta else f"threshold={self.threshold.item():.4g}",
            f"gates={self.gates}",
            f"ste={self.ste}",
            f"packed={self._packed.form}" if self._packed is not None else "",
        ]
        return ", ".join(part for part in parts if part)
