"""Routers: x [T,H] of any dtype -> logits [T,R] in float32 (float64 in a float64 layer).

A logit decides over an expert, so routers keep their parameters and arithmetic in float32 under
autocast and when the model around them is moved to a half type.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_ext.router_op import router_logits


def at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    """float64 stays, everything else becomes float32."""
    return torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32


def without_half_casts(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What Module._apply is given, with its device moves, but float32 in place of half types."""

    def moved(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        if out.is_floating_point() and out.itemsize < 4:
            return tensor.to(out.device, torch.float32)
        return out

    return moved


class LinearRouter(nn.Module):
    """logits = x @ weight.T + bias; weight [R,H], bias [R] or None.

    No nn.Linear: quantisers, LoRA's "all-linear" and other models' _init_weights look for those.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, bias: bool = True, *, device=None, dtype=None
    ):
        super().__init__()
        # None: random weights. A number: zero weights and this bias, so that every logit is it.
        self.start_logit = None
        self.hidden_size, self.num_experts = hidden_size, num_experts
        options = {"device": device, "dtype": at_least_float32(dtype)}
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, **options))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, **options)) if bias else None
        )
        self.reset_parameters()

    def start_at(self, logit: float | None) -> None:
        """Initialises for constant logits (router_init="dense"); None: at random ("paper")."""
        self.start_logit = logit
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.start_logit is None:
            nn.init.normal_(self.weight, std=0.02)
        else:
            nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.start_logit or 0.0)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self.logits(x)
        return self.logits(x)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """weight and bias, float32 at least: FSDP2's mixed precision hands out copies in a half
        type, and DeepSpeed casts the parameters themselves."""
        weight, bias = self.weight, self.bias
        if weight.itemsize < 4:
            weight, bias = weight.float(), None if bias is None else bias.float()
        return weight, bias

    def logits(self, x: Tensor) -> Tensor:
        weight, bias = self.weights()
        if weight.dtype == torch.float64 or x.dtype == torch.float64:
            x = x.to(weight.dtype)
        return router_logits(x, weight, bias)

    def _apply(self, fn, recurse=True):
        return super()._apply(without_half_casts(fn), recurse)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts}, bias={self.bias is not None}"


class NoisyRouter(LinearRouter):
    """MoDSE: logits = x Wg + RMSNorm(softplus(x Wn)) * gain; noise_weight [R,H], noise_gain [R]."""

    def __init__(
        self, hidden_size: int, num_experts: int, bias: bool = True, *, device=None, dtype=None
    ):
        super().__init__(hidden_size, num_experts, bias, device=device, dtype=dtype)
        options = {"device": device, "dtype": self.weight.dtype}
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size, **options))
        self.noise_gain = nn.Parameter(torch.empty(num_experts, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "noise_gain" in self._parameters:  # not yet in the base class's constructor
            nn.init.normal_(self.noise_weight, std=0.02)
            # A gain of 0 keeps constant logits constant at the start; it learns from there.
            nn.init.constant_(self.noise_gain, 1.0 if self.start_logit is None else 0.0)

    def logits(self, x: Tensor) -> Tensor:
        noise = F.softplus(F.linear(x.to(self.noise_weight.dtype), self.noise_weight))
        return super().logits(x) + F.rms_norm(noise, noise.shape[-1:], self.noise_gain)


ROUTERS = {"linear": LinearRouter, "modse": NoisyRouter}
