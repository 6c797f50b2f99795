"""Holds the active share of every FFN from the first step on.

    q_l    the threshold that would have left exactly the target on in the step's own batch
    tau_l  <- tau_l + rate pace (q_l - tau_l)      once per optimiser step

Feedback on the share alone (losses.ThresholdController) has to guess how far a threshold moves it,
and is late: distillation moves a whole layer's scores within a few steps. The batch's own scores
tell the right threshold at once. It is averaged over some steps, because a batch is a sample: the
share at a fixed threshold differs by a few hundredths from text to text. pace is the learning rate
over its peak: scores move slower as it falls, so that more batches can be averaged, and the last
thresholds, which stay, are those of hundreds and not of ten.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ffn_layers
from ..losses import LambdaController, ThresholdController
from ..routers import default_balance

RATE = 0.5


class QuantileController(ThresholdController):
    """tau_l follows the quantile of the layer's own scores; for method "threshold".

    Scores are read from the routers' outputs in training; padding is counted like text. The state
    is the layers' threshold buffers, as with ThresholdController. Call close() after training.
    """

    def __init__(self, model: torch.nn.Module, target_active: float, rate: float = RATE):
        super().__init__(model, target_active, eta=rate)
        methods = {ffn.method for ffn in self.ffns}
        if methods != {"threshold"}:
            raise ValueError(f"method {' and '.join(sorted(methods))} has no score to compare with")
        self._wanted: list[list[Tensor]] = [[] for _ in self.ffns]
        self._hooks = [
            ffn.router.register_forward_hook(self._watch(index))
            for index, ffn in enumerate(self.ffns)
        ]

    def _watch(self, index: int) -> Callable[..., None]:
        ffn = self.ffns[index]
        sizes = ffn.expert_offsets.diff()[ffn.num_shared :].tolist()
        share = self.target_active * ffn.intermediate_size - ffn.shared_size
        share = min(max(share / sum(sizes), 0.0), 1.0)

        def note(router: nn.Module, args: Any, logits: Tensor) -> None:
            if router.training and torch.is_grad_enabled():
                self._wanted[index].append(score_above_which(logits.detach(), sizes, share))

        return note

    @torch.no_grad()
    def step(self) -> None:
        for ffn, seen in zip(self.ffns, self._wanted, strict=True):
            if not seen:
                continue
            wanted = torch.stack(seen).mean()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(wanted)
                wanted /= torch.distributed.get_world_size()
            rate = self.eta * self.pace
            ffn.set_threshold(ffn.threshold.lerp(wanted.to(ffn.threshold), rate))
            seen.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def controller_for(
    model: torch.nn.Module, target_active: float, rate: float = RATE
) -> ThresholdController | LambdaController:
    """The controller of fine-tuning: by the quantile where gates are 0 or 1, as calibration makes
    them. Scores as gates start dense, all alike: there the integral opens the gap step by step.
    ReMoE has no threshold: its loss is weighed."""
    kinds = {(ffn.method, ffn.gates) for ffn in ffn_layers(model)}
    if kinds == {("threshold", "binary")}:
        return QuantileController(model, target_active, rate)
    if {method for method, _ in kinds} == {"relu"}:
        return LambdaController(model, target_active)
    return ThresholdController(model, target_active, rate / 10)


def thresholds_suffice(options: dict[str, Any]) -> bool:
    """Whether thresholds alone hold a model's target. A loss that pushes the scores down all the
    time would only make them follow, and switch experts for nothing; a balance loss has its own
    purpose, and ReMoE has no threshold."""
    has_balance = options["balance"] or default_balance(options["method"])
    return options["method"] != "relu" and not has_balance


def score_above_which(logits: Tensor, sizes: list[int], share: float) -> Tensor:
    """The score sigmoid(logit), fp32 0-d, above which `share` of the routed neurons lie.

    logits [..., R], sizes [R]: every expert counts by its neurons.
    """
    flat = logits.float().flatten(0, -2)
    if len(set(sizes)) == 1:
        rank = min(max(round((1 - share) * flat.numel()), 1), flat.numel())
        return torch.sigmoid(flat.flatten().kthvalue(rank).values)
    values, order = flat.flatten().sort()
    below = torch.tensor(sizes, device=flat.device, dtype=torch.float64)
    below = below.repeat(len(flat))[order].cumsum(0)
    last_off = torch.searchsorted(below, (1 - share) * below[-1])
    return torch.sigmoid(values[last_off.clamp(max=len(values) - 1)])
