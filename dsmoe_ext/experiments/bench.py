"""What all experiments share: the dense model, the text it says itself, the texts to measure on."""

import copy
import math
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibration import calibrate
from ..command_line.text import OWN_LENGTH, Text, own_windows, texts_to_measure
from ..layers import find_ffns
from ..loading import load_model, need_tokenizer
from ..models.options import options_of
from ..training.controller import thresholds_suffice
from ..training.data import TextWindows, prose_text, second_domain_text, windows_of
from ..training.evaluate import Evaluation, evaluate, supports_bf16
from ..training.fine_tune import fine_tune, recovery
from ..training.measure import inference_copy
from ..training.sources import SELF, Source, read_windows
from .record import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Bench:
    """One dense model under test, and the measurements that every row of a table is made of."""

    def __init__(
        self,
        model: str,
        tokens: int,
        window: int,
        windows: int,
        wikitext: Path | None,
        seed: int,
        drawn: Record,
    ):
        self.name, self.tokens, self.window = model, tokens, window
        self.windows, self.wikitext, self.seed = windows, wikitext, seed
        self.drawn = drawn
        self.dense, tokenizer = load_model(model, dtype="fp32")
        self.tokenizer = need_tokenizer(tokenizer, model)

    def text(self, name: str, tokens: int) -> torch.Tensor:
        """Windows [N,L], `tokens` in all, of "self", another source, or several joined by "+", the
        same share of each."""
        parts, share = name.split("+"), tokens // len(name.split("+"))
        rows = max(1, -(-share // self.window))
        windows = []
        for part in parts:
            if part == SELF:
                windows.append(_evenly(self.own_text, rows))  # its parts begin differently
            else:
                read = read_windows(self.tokenizer, [Source(part)], self.window, share)
                windows.append(read.train[:rows])
        return torch.cat(windows)

    @cached_property
    def own_text(self) -> torch.Tensor:
        """Windows [N,L] that the dense model says itself, `tokens` in all: drawn once for all
        tables, which so compare the same."""
        what = {"tokens": self.tokens, "window": self.window, "seed": self.seed}

        def draw() -> dict[str, Any]:
            return {"ids": own_windows(self.dense, **what).tolist()}

        return torch.tensor(self.drawn.measure({"model": self.name, **what}, draw)["ids"])

    @cached_property
    def texts(self) -> list[Text]:
        """Built-in English, Python source and prose, and WikiText-2 where its file is given."""
        texts = texts_to_measure(self.dense, self.tokenizer, None, None, window=self.window)
        for name, text in (("python", second_domain_text()), ("prose", prose_text())):
            cut = windows_of(self.tokenizer, text, self.window)
            texts.append(Text(name, torch.cat([cut.train, cut.held_out]), cut.num_context))
        if self.wikitext:
            texts += texts_to_measure(
                self.dense, self.tokenizer, None, self.wikitext, window=self.window
            )
        return [Text(text.name, spread(text, self.windows), text.context) for text in texts]

    def calibrate(
        self, target_active: float, text: torch.Tensor | None = None, **options: Any
    ) -> tuple[Any, float]:
        """calibrate() on a text (the own one) -> (the sparse model, the seconds it took)."""
        text, start = self.own_text if text is None else text, time.perf_counter()
        sparse = calibrate(self.dense, text, target_active, seed=self.seed, **options)
        return sparse, time.perf_counter() - start

    def dense_copy(self) -> "PreTrainedModel":
        """The dense model with weights of its own, for training."""
        return copy.deepcopy(self.dense)

    def tune(
        self, model: "PreTrainedModel", steps: int, distill: float, **settings: Any
    ) -> list[dict[str, Any]]:
        """Trains the FFNs in place on the own text, by the recipe of `dsmoe demo` -> its log.

        distill: 1 learns from the dense model alone, 0 from the text alone, as a model that has no
        teacher would. settings: others than the recipe's.
        """
        target = hold_target(model)
        chosen = {"distill": distill, "target_active": target, "seed": self.seed} | settings
        rows = self.own_text.view(-1, min(self.window, OWN_LENGTH))  # as they were drawn
        text = TextWindows(rows, rows[:1])
        return fine_tune(model, text, recovery(steps, **chosen), teacher=inference_copy(self.dense))

    def losses_tuned(
        self,
        steps: int,
        distill: float,
        target_active: float | None = None,
        ste: str | None = None,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Losses behind `tune`, and the active share of every step: of a model calibrated to
        target_active with options, or of the dense one.

        ste: another straight-through gradient than the model's own. settings: as for `tune`.
        """
        if target_active is None:
            start = self.dense_copy()
        else:
            start, _ = self.calibrate(target_active, **options)
        if ste is not None:
            options_of(start)["ste"] = ste
            for ffn in find_ffns(start):
                ffn.ste = ste
        log = self.tune(start, steps, distill, **(settings or {}))
        return self.losses(start) | {"held": [row.get("active") for row in log]}

    def losses(self, model: "PreTrainedModel") -> dict[str, Any]:
        """{"loss": nats per token by text, "active": share of the FFN by text, "layers": that of
        every FFN by text}, of the model as it would be used."""
        return self.losses_in_place(inference_copy(model))

    def losses_in_place(self, model: "PreTrainedModel") -> dict[str, Any]:
        """The same of the model as it is; in float32 under bf16 autocast where that is faster."""
        results = {text.name: self.evaluate(model, text) for text in self.texts}
        return {
            "loss": {name: result.loss for name, result in results.items()},
            "active": {name: result.active for name, result in results.items()},
            "layers": {name: result.active_per_layer for name, result in results.items()},
        }

    def evaluate(self, model: "PreTrainedModel", text: Text) -> Evaluation:
        """One text alone, likewise in place."""
        bf16 = supports_bf16() and model.dtype == torch.float32
        return evaluate(model, text.ids, num_context=text.context, bf16=bf16)

    def what(self, **fields: Any) -> dict[str, Any]:
        """What decides a row, for Record.measure."""
        common = {"model": self.name, "tokens": self.tokens, "seed": self.seed}
        return fields | common | {"windows": self.windows, "window": self.window}


def hold_target(model: "PreTrainedModel") -> float | None:
    """Turns the sparsity loss off where thresholds hold the share -> the share to hold."""
    options = options_of(model) if find_ffns(model) else {}
    target: float | None = options.get("target_active")
    if target is not None and thresholds_suffice(options):
        options["sparsity_weight"] = 0.0
    return target


def spread(text: Text, count: int) -> torch.Tensor:
    """At most `count` windows of the length that others have, evenly through the text."""
    return _evenly(text.ids, count) if count else text.ids


def _evenly(windows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the windows [N,L], evenly through them; all, if there are no more."""
    if count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def ratio(row: dict[str, Any], dense: dict[str, Any], text: str) -> float:
    """Perplexity of a row as a multiple of the dense model's."""
    return math.exp(row["loss"][text] - dense["loss"][text])
