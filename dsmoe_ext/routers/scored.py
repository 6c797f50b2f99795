"""What the routers share that score each expert and pick by the scores: logits -> `ops.route`."""

import math

import torch
from torch import Tensor

from dsmoe_ext import ops
from dsmoe_ext.ops import Routing
from dsmoe_ext.routers.interface import Router
from dsmoe_ext.routers.linear import LinearRouter


def dense_start(method: str, threshold: float, num_experts: int, top_k: int) -> tuple[float, float]:
    """Logit and unscaled gate that every expert starts with under router_init="dense"."""
    if method == "threshold":
        if not 0 <= threshold < 1:
            raise ValueError(f"router_init='dense' needs a threshold in [0, 1), got {threshold}")
        score = (threshold + 1) / 2  # half way between tau and 1: room to move on both sides
        return math.log(score / (1 - score)), score
    return {"relu": (1.0, 1.0), "top_p": (0.0, 1 / num_experts), "top_k": (0.0, 1 / top_k)}[method]


class ScoredRouter(Router):
    """logits = x W + b, then the `rule` of `ops.route`. Options:

    threshold    tau, or the probability mass of "top_p"; a buffer, saved with the model
    top_k        experts of every token under the rule "top_k"
    gates        "scores" or "binary" (1 where active)
    rescale      multiply a token's gates by I_routed / (its active routed neurons): E/k if equal
    gate_scale   factor on every routed gate
    bias         whether the logits have one
    """

    rule = "threshold"
    defaults = dict(  # noqa: RUF012
        threshold=0.5, top_k=2, gates="scores", rescale=False, gate_scale=1.0, bias=False
    )

    def __init__(self, hidden_size, expert_sizes, num_shared=0, *, device=None, dtype=None, **opts):
        super().__init__(hidden_size, expert_sizes, num_shared, **opts)
        self.top_k = self.options["top_k"]
        if self.rule == "top_k" and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k must lie between 1 and the {self.num_experts} routed experts, "
                f"got {self.top_k}"
            )
        self.logits = self.make_logits(device, dtype)
        start = torch.tensor(self.options["threshold"], dtype=torch.float32, device=device)
        self.register_buffer("threshold", start)

    def make_logits(self, device, dtype):
        """The module from x [T,H] to logits [T,R]."""
        size = (self.hidden_size, self.num_experts, self.options["bias"])
        return LinearRouter(*size, device=device, dtype=dtype)

    def start_dense(self) -> None:
        """Constant logits that switch all (of top_k: k) experts on, and gates scaled to 1."""
        if self.logits is None:
            return
        threshold, gates = float(self.options["threshold"]), self.options["gates"]
        logit, score = dense_start(self.rule, threshold, self.num_experts, self.top_k)
        if logit and self.logits.bias is None:
            raise ValueError(f"a dense start of {type(self).__name__} needs the option bias=True")
        self.logits.start_at(logit)
        if self.options["gate_scale"] == self.defaults["gate_scale"] and gates == "scores":
            self.options["gate_scale"] = 1 / score

    def forward(self, x: Tensor, gate_proj: Tensor | None = None) -> Routing:
        return self.pick(self.logits(x))

    def pick(self, logits: Tensor) -> Routing:
        """The rule alone."""
        return ops.route(
            logits,
            self.threshold,
            self.offsets(logits.device),
            method=self.rule,
            top_k=self.top_k if self.rule == "top_k" else 0,
            **{name: self.options[name] for name in ("gates", "rescale", "gate_scale")},
        )
