"""Fine-tuning of a causal language model on token windows, dense or converted.

One optimiser step: `accumulate` micro-batches of `batch_size` windows, loss
    (1 - distill) * L_LM + distill * KL(teacher || model) + the model's own sparsity loss,
gradient norm clipped, AdamW with one rate for routers and one for all other weights (linear
warm-up, linear decay to a tenth), then one step of the threshold controller where a target is held.
Nothing depends on more than settings, data and step: a resumed run gives the same bits.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..layers import find_ffns
from .checkpoint import find_checkpoints, load_checkpoint, save_checkpoint
from .controller import controller_for
from .data import TextWindows
from .evaluate import activity, activity_since, autocast, supports_bf16
from .log import TrainingLog


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What decides the result of a run; all of it is recorded and compared on resuming."""

    steps: int = 80
    batch_size: int = 1  # windows in a micro-batch
    accumulate: int = 1  # micro-batches in a step
    lr: float = 2e-5
    router_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.05  # share of the steps
    clip: float = 1.0  # largest norm of the gradient; 0: no limit
    distill: float = 0.0  # share of the loss that is the KL divergence to the teacher
    target_active: float | None = None  # share of the FFN to hold; None: thresholds stay
    controller_rate: float = 0.5  # of the thresholds, per step (controller.py)
    bf16: bool | None = None  # autocast; None: where the processor is faster that way
    seed: int = 0


def router_parameters(model) -> list[torch.nn.Parameter]:
    """The parameters of every router, which learn at their own rate."""
    return [p for name, p in model.named_parameters() if ".router." in f".{name}"]


def make_optimizer(model, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that want a gradient: [weights, routers]."""
    routers = {id(p) for p in router_parameters(model)}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in routers]
    chosen = [p for p in model.parameters() if p.requires_grad and id(p) in routers]
    groups = [
        {"params": weights, "lr": settings.lr, "weight_decay": settings.weight_decay},
        {"params": chosen, "lr": settings.router_lr, "weight_decay": 0.0},
    ]
    groups = [group | {"peak_lr": group["lr"]} for group in groups if group["params"]]
    if not groups:
        raise UserError("the model has no parameter to train")
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)


def schedule(step: int, settings: TrainSettings) -> float:
    """Factor on the learning rates at step 0 .. steps-1: linear up, then linear down to 0.1."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * (step - warmup) / max(1, settings.steps - warmup)


def lm_and_total_loss(model, ids, *, teacher=None, distill: float = 0.0):
    """(language-model loss, loss to descend, sparsity loss or None) for windows [B,L] int64."""
    out = model(input_ids=ids, labels=ids, use_cache=False)
    lm_loss = getattr(out, "lm_loss", None)
    lm_loss = out.loss if lm_loss is None else lm_loss
    total = out.loss
    if teacher is not None and distill > 0:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            wanted = F.log_softmax(wanted.float(), dim=-1)
        got = F.log_softmax(out.logits[:, :-1].flatten(0, 1).float(), dim=-1)
        divergence = F.kl_div(got, wanted, log_target=True, reduction="batchmean")
        total = total - distill * lm_loss + distill * divergence
    return lm_loss, total, getattr(out, "sparsity_loss", None)


class _Run:
    """Model, optimiser and controller of one run, and what a checkpoint needs of them."""

    def __init__(self, model, windows: TextWindows, settings: TrainSettings, teacher):
        self.model, self.windows, self.settings, self.teacher = model, windows, settings, teacher
        self.device = next(model.parameters()).device
        self.bf16 = computes_in_bf16(model, settings)
        self.optimizer = make_optimizer(model, settings)
        self.controller = None
        if settings.target_active is not None and router_parameters(model):
            self.controller = controller_for(
                model, settings.target_active, settings.controller_rate
            )

    def close(self) -> None:
        if self.controller:
            self.controller.close()

    def step(self, step: int) -> dict:
        """One optimiser step; the row for the log."""
        settings, start = self.settings, time.perf_counter()
        seen = activity(self.model)
        factor = schedule(step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        ids = self.windows.batch(step, settings.batch_size * settings.accumulate, settings.seed)
        lm_sum, sparsity_sum = 0.0, 0.0
        for part in ids.to(self.device).split(settings.batch_size):
            with autocast(self.device, self.bf16):
                lm_loss, total, sparsity = lm_and_total_loss(
                    self.model, part, teacher=self.teacher, distill=settings.distill
                )
            (total * (len(part) / len(ids))).backward()
            lm_sum += lm_loss.item() * len(part) / len(ids)
            sparsity_sum += 0.0 if sparsity is None else sparsity.item() * len(part) / len(ids)
        limit = settings.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if not math.isfinite(norm) or not math.isfinite(lm_sum):
            raise UserError(
                f"the loss or its gradient is not finite at step {step + 1} "
                f"(loss {lm_sum}, norm {norm}): use a lower --lr, or --dtype fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "loss": lm_sum, "sparsity_loss": sparsity_sum, "grad_norm": norm}
        row |= {"lr": settings.lr * factor} | self._hold_target(seen)
        seconds = time.perf_counter() - start
        return row | {"seconds": seconds, "tokens_per_second": ids.numel() / seconds}

    def _hold_target(self, seen: list[torch.Tensor]) -> dict:
        """Moves the thresholds; what was active in this step and where they are now, by layer."""
        layers = find_ffns(self.model)
        if not layers:
            return {}
        shares = activity_since(self.model, seen)
        if self.controller:
            self.controller.step()
        thresholds = [layer.threshold.item() for layer in layers]
        mean = sum(shares) / len(shares)
        return {"active": mean, "active_per_layer": shares, "thresholds": thresholds}


def fine_tune(
    model,
    windows: TextWindows,
    settings: TrainSettings,
    *,
    teacher=None,
    run_dir: Path | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    identity: dict | None = None,
    on_step: Callable[[dict], dict | None] | None = None,
) -> list[dict]:
    """Trains in place and returns the log, one row a step.

    run_dir: where train.jsonl, TensorBoard's files and checkpoints go (None: nowhere).
    resume: go on from the newest checkpoint in run_dir, if there is one.
    identity: what else must be the same on resuming (the model's folder, say).
    on_step(row): called after every step; what it returns is added to the row (an evaluation, say).
    """
    torch.manual_seed(settings.seed)
    run = _Run(model, windows, settings, teacher)
    checks = run_checks(model, windows, settings, identity or {})
    first, found = 0, find_checkpoints(run_dir) if run_dir and resume else []
    if found:
        record = load_checkpoint(found[-1][1], model, run.optimizer)
        check_same(record["checks"], checks)
        first = record["step"]
    log = TrainingLog(run_dir, resume_step=first)
    was_training = model.training
    model.train()
    try:
        for step in range(first, settings.steps):
            row = run.step(step)
            row |= (on_step(row) if on_step else None) or {}
            log.write(row)
            done = step + 1
            if run_dir and checkpoint_every and done % checkpoint_every == 0:
                save_checkpoint(run_dir, done, model, run.optimizer, {"checks": checks})
    finally:
        run.close()
        model.train(was_training)
        log.close()
    return log.rows


def run_checks(model, windows: TextWindows, settings: TrainSettings, identity: dict) -> dict:
    """What must be the same on resuming a run, ready for JSON."""
    return {
        "settings": dataclasses.asdict(settings),
        "data": windows.digest(),
        "identity": identity,
        "bf16": computes_in_bf16(model, settings),
    }


def computes_in_bf16(model, settings: TrainSettings) -> bool:
    """Whether a run uses bf16 autocast."""
    if settings.bf16 is not None:
        return settings.bf16
    return supports_bf16(next(model.parameters()).device)


def check_same(recorded: dict, wanted: dict) -> None:
    """Refuses to go on with other settings: the losses would belong to neither run."""

    def flat(tree: dict) -> dict:
        nested = tree["settings"] | tree["identity"]
        return nested | {"data": tree["data"], "bf16": tree["bf16"]}

    old, new = flat(recorded), flat(wanted)
    changed = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
    changed.sort(key=lambda name: (name == "data", name))  # another window makes other data
    if changed:
        name = changed[0]
        raise UserError(
            f"cannot resume with another {name}: the run has {old.get(name)}, "
            f"now it is {new.get(name)}; use the same, or --overwrite to start again"
        )
