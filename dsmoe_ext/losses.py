"""Losses and controllers that decide how sparse training makes a model (formulas: DSMoE, XMoE,
MoDSE, ReMoE)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.models.options import options_of
from dsmoe_ext.ops import Routing
from dsmoe_ext.sparsity import sparsity_terms
from dsmoe_ext.statistics import active_share


def sparsity_sum(
    routing: Routing,
    expert_offsets: Tensor,
    *,
    binary: bool = False,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of one layer's sparsity term; 0-d. Sums add up over micro-batches.

    gates as scores  (1/R) sum_e G_e, G_e being the score where the pair is active and 0 elsewhere:
                     the gradient reaches active pairs only (DSMoE's L1)
    binary gates     sum_e (S_e / I_routed) s_e over all routed pairs, since the gradient of
                     G = mask would be 0

    routing: gates [T,E], scores [T,R]. token_mask [T] (bool): the tokens that count.
    """
    per_token = sparsity_terms(routing, expert_offsets, binary)
    if token_mask is not None:
        # where, not a product: whatever padding computes, even NaN, must not reach the sum.
        per_token = torch.where(token_mask, per_token, 0.0)
    return per_token.sum()


def sparsity_loss(
    routing: Routing,
    expert_offsets: Tensor,
    *,
    binary: bool = False,
    token_mask: Tensor | None = None,
) -> Tensor:
    """sparsity_sum as the mean over the tokens that count; 0-d."""
    tokens = routing.scores.shape[0] if token_mask is None else token_mask.sum()
    total = sparsity_sum(routing, expert_offsets, binary=binary, token_mask=token_mask)
    return total / torch.as_tensor(tokens, device=total.device).clamp(min=1)


class _Controller:
    """Steps once per optimiser step on what the layers used in training since the step before."""

    pace = 1.0  # the learning rate over its peak, for those that slow down with it

    def __init__(self, model: nn.Module, target_active: float):
        if not 0 < target_active <= 1:
            raise ValueError(f"target_active must lie in (0, 1], got {target_active}")
        self.model = model
        self.target_active = target_active
        self.ffns = ffn_layers(model)
        self._seen = [ffn.activity.totals()[1] for ffn in self.ffns]

    def _shares(self) -> list[Tensor]:
        """Each layer's active share since the last call, over all ranks; fp64 0-d on its device."""
        shares = []
        for index, ffn in enumerate(self.ffns):
            totals = ffn.activity.totals()[1]
            fresh = totals - self._seen[index].to(totals.device)
            self._seen[index] = totals
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(fresh)
            shares.append(active_share(fresh, ffn.expert_offsets))
        return shares

    def step(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Called after the last step: lets go of what the controller has put into the model."""

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Calls step() after each optimizer.step(); returns the handle that undoes it."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        return optimizer.register_step_post_hook(lambda *_: self.step())

    def trainer_callback(self) -> Any:
        """The same for transformers: Trainer(..., callbacks=[controller.trainer_callback()])."""
        from transformers import TrainerCallback

        class ControllerCallback(TrainerCallback):
            def on_step_end(callback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.step()

        return ControllerCallback()


class ThresholdController(_Controller):
    """Holds every layer at its target by integral feedback: tau_l += eta (active_l - target).

    The state is the layers' threshold buffers: saving the model saves it. Works in both directions
    and for any gates. active_l counts the shared expert, so that target_active is a share of the
    whole FFN. tau stays in [0, 1], beyond which nothing would change any more.

    eta: 0.05 moves tau by 0.01 a step where the share is 0.2 too high. From a dense start, where
    all scores are equal at first, a much larger one switches all experts off at once.
    """

    def __init__(self, model: nn.Module, target_active: float, eta: float = 0.05):
        super().__init__(model, target_active)
        methods = {ffn.method for ffn in self.ffns}
        if not methods <= {"threshold", "top_p"}:
            raise ValueError(f"method {' and '.join(sorted(methods))} has no threshold to control")
        self.eta = eta

    @torch.no_grad()
    def step(self) -> None:
        for ffn, share in zip(self.ffns, self._shares(), strict=True):
            error = share - self.target_active
            if ffn.method == "top_p":  # there, a higher threshold means more experts
                error = -error
            move = self.eta * error
            move = torch.nan_to_num(move)  # NaN: no tokens, no move
            ffn.set_threshold((ffn.threshold + move).clamp(0.0, 1.0))


class LambdaController(_Controller):
    """ReMoE's controller of the sparsity weight: lambda *= alpha ** sign(active - target).

    active is the mean over all layers. Acts on model.config.dsmoe["sparsity_weight"], which is
    saved with the model. Reads one number on the host a step.
    """

    def __init__(
        self, model: nn.Module, target_active: float, alpha: float = 1.2, start: float | None = None
    ):
        super().__init__(model, target_active)
        self.alpha = alpha
        self.options = options_of(model)
        if start is not None:  # ReMoE starts at 1e-8
            self.options["sparsity_weight"] = start
        if not self.options["sparsity_weight"] > 0:
            raise ValueError(
                f"the sparsity weight is {self.options['sparsity_weight']:g}, and a factor never "
                "moves it from there: start above 0, say at 1e-8"
            )

    @torch.no_grad()
    def step(self) -> None:
        shares = torch.stack([share.cpu() for share in self._shares()])
        error = shares.mean().item() - self.target_active
        if not math.isnan(error):  # NaN: no tokens
            self.options["sparsity_weight"] *= self.alpha ** ((error > 0) - (error < 0))
