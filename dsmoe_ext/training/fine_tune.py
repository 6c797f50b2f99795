"""Fine-tuning of a causal language model on token windows, dense or converted, by SparseTrainer.

AdamW with one rate for routers and one for all other weights (linear warm-up, linear decay to a
tenth), gradient norm clipped, then one step of the threshold controller where a target is held.
Nothing depends on more than settings, data and step: a resumed run gives the same bits.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from ..layers import find_ffns
from ..models.adopt import gated_mlps, text_model
from .callbacks import ActiveShare, JsonLines
from .checkpoint import KeepNewest, newest_checkpoint
from .controller import controller_for
from .data import TextWindows
from .evaluate import supports_bf16
from .record import check_same, tensors_digest, write_record
from .trainer import SparseTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINED = ("all", "ffn")


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
    trained: str = "all"  # parameters: "all", or those of the "ffn"s with their routers
    target_active: float | None = None  # share of the FFN to hold; None: thresholds stay
    controller_rate: float = 0.5  # of the thresholds, per step (controller.py)
    bf16: bool | None = None  # autocast; None: where the processor is faster that way
    seed: int = 0


def recovery(steps: int, **changes: Any) -> TrainSettings:
    """What brings a calibrated model back towards its dense teacher in few steps.

    The FFNs alone lost something, so they alone are trained: without the embeddings' gradient and
    moments a step is cheaper. The rates are low, for routers above all: at 3e-4 and 1e-3 the same
    steps undo what calibration found (docs/log/calibration.md). Scores then move slowly, and
    thresholds can be averaged over many batches.
    """
    chosen: dict[str, Any] = {
        "batch_size": 2,
        "lr": 1e-4,
        "router_lr": 1e-5,
        "distill": 1.0,
        "trained": "ffn",
        "controller_rate": 0.1,
    }
    return TrainSettings(steps=steps, **chosen | changes)


class WindowDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Token windows [N,L] as Trainer wants them: every token but a window's first is predicted."""

    def __init__(self, windows: torch.Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def training_arguments(
    model: "PreTrainedModel", settings: TrainSettings, run_dir: Path | str, checkpoint_every: int
) -> TrainingArguments:
    """The settings in Trainer's words."""
    warmup = max(1, round(settings.warmup * settings.steps))
    return TrainingArguments(
        output_dir=str(run_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta2=0.99,
        max_grad_norm=settings.clip,
        warmup_steps=warmup,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": settings.steps - warmup,
            "decay_type": "linear",
            "min_lr_ratio": 0.1,
        },
        bf16=computes_in_bf16(model, settings),
        use_cpu=next(model.parameters()).device.type == "cpu",
        seed=settings.seed,
        save_strategy="steps" if checkpoint_every else "no",
        save_steps=checkpoint_every or 500,
        logging_steps=1,
        report_to="none",
        include_num_input_tokens_seen=True,
        disable_tqdm=True,
    )


def fine_tune(
    model: "PreTrainedModel",
    windows: TextWindows,
    settings: TrainSettings,
    *,
    teacher: "PreTrainedModel | None" = None,
    run_dir: Path | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    identity: dict[str, Any] | None = None,
    on_step: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
) -> list[dict[str, Any]]:
    """Trains in place and returns the log, one row a step.

    run_dir: where train.jsonl, TensorBoard's files and checkpoints go (None: nowhere).
    resume: go on from the newest checkpoint in run_dir, if there is one.
    identity: what else must be the same on resuming (the model's folder, say).
    on_step(row): called after every step; what it returns is added to the row (an evaluation, say).
    """
    start = None
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        checks = run_checks(model, windows, settings, identity or {})
        if resume:
            check_same(run_dir, checks)
            start = newest_checkpoint(run_dir)
        write_record(run_dir, checks)
    controller = None
    if settings.target_active is not None and find_ffns(model):
        controller = controller_for(model, settings.target_active, settings.controller_rate)
    active = ActiveShare(model, controller)
    log = JsonLines(None if run_dir is None else run_dir / "train.jsonl", active, on_step)
    was_training = model.training
    with ExitStack() as stack:
        if controller is not None:
            stack.callback(controller.close)
        stack.callback(model.train, was_training)
        stack.enter_context(frozen_but(model, settings.trained))
        folder = run_dir or stack.enter_context(tempfile.TemporaryDirectory())
        trainer = SparseTrainer(
            model,
            training_arguments(model, settings, folder, checkpoint_every if run_dir else 0),
            train_dataset=WindowDataset(windows.train),
            router_lr=settings.router_lr,
            teacher=teacher if settings.distill else None,
            distill=settings.distill,
            callbacks=[active, log, KeepNewest(), *_tensorboard(run_dir)],
        )
        trainer.remove_callback(PrinterCallback)
        # accelerate leaves autocast around the model's forward; its user gets back what was given.
        stack.callback(trainer.accelerator.unwrap_model, model, keep_fp32_wrapper=False)
        trainer.train(resume_from_checkpoint=start and str(start))
    return log.rows


@contextmanager
def frozen_but(model: nn.Module, trained: str) -> Iterator[None]:
    """Inside, no parameter but those that are to be trained asks for a gradient."""
    if trained not in TRAINED:
        raise ValueError(f"trained must be one of {', '.join(TRAINED)}, got {trained!r}")
    others = []
    if trained == "ffn":
        ffns = find_ffns(model) or gated_mlps(text_model(model)).values()
        kept = {id(parameter) for ffn in ffns for parameter in ffn.parameters()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def run_checks(
    model: "PreTrainedModel",
    windows: TextWindows,
    settings: TrainSettings,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """What must be the same on resuming a run, ready for JSON."""
    return {
        "settings": dataclasses.asdict(settings),
        "data": windows.digest(),
        "identity": identity,
        "tensors": tensors_digest(model),
        "bf16": computes_in_bf16(model, settings),
    }


def computes_in_bf16(model: "PreTrainedModel", settings: TrainSettings) -> bool:
    """Whether a run uses bf16 autocast."""
    if settings.bf16 is not None:
        return settings.bf16
    return supports_bf16(next(model.parameters()).device)


def _tensorboard(run_dir: Path | None) -> list[TensorBoardCallback]:
    if run_dir is None or not is_tensorboard_available():
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(run_dir / "tensorboard")))]
