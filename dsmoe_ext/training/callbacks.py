"""What a sparse run does beside Trainer's own: hold the active share, and say what was active."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from ..files import atomic_file, json_text
from ..layers import find_ffns, start_step
from .evaluate import activity, activity_since

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StartStep(TrainerCallback):
    """Lets routers draw what they draw once a step (MatFormer's size)."""

    def __init__(self, model: "PreTrainedModel"):
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start_step(self.model, state.global_step)


class ActiveShare(TrainerCallback):
    """Adds each step's active share and thresholds to the log, and lets a controller move them.

    Lists have one number a layer. Runs before any callback that writes the log.
    """

    def __init__(self, model: "PreTrainedModel", controller: Any = None):
        self.model, self.controller = model, controller
        self.seen: list[torch.Tensor] = []
        self.row: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = activity(self.model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = find_ffns(self.model)
        if not layers:
            return
        shares = activity_since(self.model, self.seen)
        if self.controller is not None:
            if state.global_step > args.warmup_steps:
                group = kwargs["optimizer"].param_groups[0]
                self.controller.pace = group["lr"] / group["initial_lr"]
            self.controller.step()
        self.row = {
            "active": sum(shares) / len(shares),
            "active_per_layer": shares,
            "thresholds": [layer.threshold.item() for layer in layers],
        }


class JsonLines(TrainerCallback):
    """Writes one JSON object a step: what Trainer logs, what ActiveShare saw, tokens a second.

    A resumed run drops the rows after the step it resumes at. on_step(row) may add to the row.
    """

    def __init__(
        self,
        path: Path | None,
        active: ActiveShare,
        on_step: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
    ):
        self.path, self.active, self.on_step = path, active, on_step
        self.rows: list[dict[str, Any]] = []
        self._start, self._tokens = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.path is None:
            return
        self.rows = [row for row in read_log(self.path) if row["step"] <= state.global_step]
        with atomic_file(self.path) as partial:
            partial.write_text("".join(json_text(row) + "\n" for row in self.rows))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        seconds = time.perf_counter() - self._start
        tokens = state.num_input_tokens_seen - self._tokens
        row = {"step": state.global_step, **logs, **self.active.row}
        row["lr"] = row.pop("learning_rate")
        row |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
        row |= (self.on_step(row) if self.on_step else None) or {}
        self.rows.append(row)
        if self.path is not None and state.is_world_process_zero:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_text(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line cut short by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
