"""transformers.Trainer with what sparse models want: a rate for their routers, and a teacher.

    loss = (1 - distill) * (L_LM + the model's own sparsity loss) + distill * KL(teacher || model)

Everything else (accumulation, precision, logging, checkpoints, `accelerate launch`) is Trainer's.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..errors import UserError
from ..lm_loss import divergence
from .callbacks import StartStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SparseTrainer(Trainer):
    """Trainer for converted models and, as their control, dense ones.

    Args:
        router_lr: peak learning rate of the routers' parameters; None: that of the others.
        teacher: a dense model of the same vocabulary, in eval mode, on the same device; None: no
            distillation.
        distill: share of the teacher in the loss, 0 to 1.
        args, kwargs: as for transformers.Trainer.
    """

    optimizer: Any  # Trainer makes it as it starts

    def __init__(
        self,
        *args: Any,
        router_lr: float | None = None,
        teacher: "PreTrainedModel | None" = None,
        distill: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.router_lr = router_lr
        self.teacher = teacher
        self.distill = distill if teacher is not None else 0.0
        self._sparsity = 0.0  # of the step's micro-batches so far
        self.add_callback(StartStep(self.model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Two groups: weights at learning_rate with weight_decay, routers at router_lr without."""
        if self.optimizer is not None:
            return cast("torch.optim.Optimizer", self.optimizer)
        model = self.model if model is None else model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise UserError("the model has no parameter to train")
        weights = [p for name, p in trained if not is_router(name)]
        routers = [p for name, p in trained if is_router(name)]
        router_lr = self.args.learning_rate if self.router_lr is None else self.router_lr
        groups = [
            {"params": weights, "weight_decay": self.args.weight_decay},
            {"params": routers, "weight_decay": 0.0, "lr": router_lr},
        ]
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        optimizer = kind([group for group in groups if group["params"]], **options)
        self.optimizer = optimizer
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._sparsity += float(getattr(outputs, "sparsity_loss", None) or 0.0)
        if self.distill and self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"}).logits
            missing = divergence(outputs.logits, wanted, inputs["labels"], num_items_in_batch)
            # All from the teacher: no gradient of a loss that does not count is worth its time.
            own = (1 - self.distill) * loss if self.distill < 1 else 0.0
            loss = own + self.distill * missing
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is not finite at step {self.state.global_step + 1} ({loss.item()}): "
                "use a lower --lr, or --precision fp32"
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs["sparsity_loss"], self._sparsity = self._sparsity, 0.0
        super().log(logs, *args, **kwargs)


def is_router(parameter_name: str) -> bool:
    """Whether a parameter of a converted model belongs to a router."""
    return ".router." in f".{parameter_name}"
