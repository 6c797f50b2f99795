"""What the routers share that score each expert by logits: x W + b, then a rule of `ops.route`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from dsmoe_ext import ops
from dsmoe_ext.ops import Routing
from dsmoe_ext.router_op import router_logits
from dsmoe_ext.routers.interface import Router, at_least_float32, without_half_casts


def dense_start(method: str, threshold: float, num_experts: int, top_k: int) -> tuple[float, float]:
    """Logit and unscaled gate that every expert starts with under router_init="dense"."""
    if method == "threshold":
        if not 0 <= threshold < 1:
            raise ValueError(f"router_init='dense' needs a threshold in [0, 1), got {threshold}")
        score = (threshold + 1) / 2  # half way between tau and 1: room to move on both sides
        return math.log(score / (1 - score)), score
    return {"relu": (1.0, 1.0), "top_p": (0.0, 1 / num_experts), "top_k": (0.0, 1 / top_k)}[method]


class LinearRouter(Router):
    """logits = x W^T + b, then the `rule` of `ops.route`; weight [R,H], bias [R] or None.

    A logit decides over an expert, so parameters and arithmetic are float32, also under autocast
    and when the model around them is moved to a half type. No nn.Linear: quantisers, LoRA's
    "all-linear" and other models' _init_weights look for those. Options:

    threshold    tau, or the probability mass of "top_p"; in an FFN its buffer takes the place
    top_k        experts of every token under the rule "top_k"
    gates        "scores" or "binary" (1 where active)
    rescale      multiply a token's gates by I_routed / (its active routed neurons): E/k if equal
    gate_scale   factor on every routed gate; None: 1, or what `start_dense` makes it
    bias         whether the logits have one; None: where `start_dense` needs it
    noise        MoDSE: RMSNorm(softplus(x Wn)) * gain is added to the logits; noise_weight [R,H],
                 noise_gain [R]
    """

    rule = "threshold"
    defaults = dict(  # noqa: RUF012
        threshold=0.5, top_k=2, gates="scores", rescale=False, gate_scale=None, bias=None,
        noise=False,
    )  # fmt: skip

    def __init__(
        self,
        hidden_size: int,
        expert_sizes: Sequence[int],
        num_shared: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **opts: Any,
    ):
        super().__init__(hidden_size, expert_sizes, num_shared, **opts)
        self.threshold, self.top_k = self.options["threshold"], self.options["top_k"]
        if self.rule == "top_k" and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k must lie between 1 and the {self.num_experts} routed experts, "
                f"got {self.top_k}"
            )
        # None: random weights. A number: zero weights and this bias, so that every logit is it.
        self.start_logit: float | None = None
        self.make_weights(hidden_size, device=device, dtype=at_least_float32(dtype))

    def make_weights(self, width: int, **kind: Any) -> None:
        """The parameters of the logits of inputs [T,width]."""
        self.weight = nn.Parameter(torch.empty(self.num_experts, width, **kind))
        self.bias: nn.Parameter | None
        bias = nn.Parameter(torch.empty(self.num_experts, **kind)) if self.options["bias"] else None
        self.register_parameter("bias", bias)
        if self.options["noise"]:
            self.noise_weight = nn.Parameter(torch.empty_like(self.weight))
            self.noise_gain = nn.Parameter(torch.empty(self.num_experts, **kind))
        self.reset_parameters()

    def start_dense(self) -> None:
        """Constant logits that switch all (of top_k: k) experts on, and gates scaled to 1."""
        logit, score = dense_start(
            self.rule, float(self.options["threshold"]), self.num_experts, self.top_k
        )
        if logit and self.bias is None:
            if self.options["bias"] is not None:
                raise ValueError("router_init='dense' needs a router bias: leave router_bias out")
            self.bias = nn.Parameter(torch.empty_like(self.weight[:, 0]))
        if self.options["gate_scale"] is None and self.options["gates"] == "scores":
            self.options["gate_scale"] = 1 / score
        self.start_logit = logit
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.start_logit is None:
            nn.init.normal_(self.weight, std=0.02)
        else:
            nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.start_logit or 0.0)
        if self.options["noise"]:
            nn.init.normal_(self.noise_weight, std=0.02)
            # A gain of 0 keeps constant logits constant at the start; it learns from there.
            nn.init.constant_(self.noise_gain, 1.0 if self.start_logit is None else 0.0)

    def forward(self, x: Tensor, gate_proj: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.logits(x)
        return self.logits(x)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """weight and bias, float32 at least: FSDP2's mixed precision hands out copies in a half
        type, and DeepSpeed casts the parameters themselves."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if weight.itemsize < 4:
            weight, bias = weight.float(), None if bias is None else bias.float()
        return weight, bias

    def logits(self, x: Tensor) -> Tensor:
        weight, bias = self.weights()
        if weight.dtype == torch.float64 or x.dtype == torch.float64:
            x = x.to(weight.dtype)
        logits = router_logits(x, weight, bias)
        if not self.options["noise"]:
            return logits
        noise = F.softplus(F.linear(x.to(self.noise_weight.dtype), self.noise_weight))
        return logits + F.rms_norm(noise, noise.shape[-1:], self.noise_gain)

    def pick(self, logits: Tensor, threshold: Tensor | None = None) -> Routing:
        threshold = self.threshold if threshold is None else threshold
        return ops.route(logits, threshold, self.offsets(logits.device), **self.rule_options)

    @property
    def rule_options(self) -> dict[str, Any]:
        """The options of `ops.route`."""
        return {
            "method": self.rule,
            "top_k": self.top_k if self.rule == "top_k" else 0,
            "gates": self.options["gates"],
            "rescale": self.options["rescale"],
            "gate_scale": self.gate_scale,
        }

    @property
    def gate_scale(self) -> float:
        scale = self.options["gate_scale"]
        return 1.0 if scale is None else float(scale)

    @property
    def has_plain_logits(self) -> bool:
        """Whether logits are x W + b and no more."""
        return type(self).forward is LinearRouter.forward and not self.options["noise"]

    @property
    def is_plain(self) -> bool:
        """Whether that and `ops.route` are all there is, so that `ops.routed_ffn` does the same."""
        return self.has_plain_logits and type(self).pick is LinearRouter.pick

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(without_half_casts(fn), recurse)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts}, bias={self.bias is not None}"
