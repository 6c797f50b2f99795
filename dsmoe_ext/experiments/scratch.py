"""Methods as their papers mean them: a model that has never been dense, trained from scratch.

A LLaMA of a million parameters on bytes, small enough for a table of methods and seeds on one
core. What it says about methods is how they compare, not how good they get.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ..command_line.text import Text
from ..training.data import TextWindows, builtin_text, second_domain_text, windows_of
from ..training.fine_tune import TrainSettings, fine_tune
from ..training.tiny import byte_tokenizer, tiny_llama
from .bench import Bench, hold_target, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 256
NEURONS = 512


class Scratch(Bench):
    """A Bench whose dense model is random, and whose training is all the training there is.

    Trained on most of the built-in English and of the Python source, and measured on the rest.
    neurons: of its FFNs. Active shares are of NEURONS whatever it has, as a measure of work.
    """

    def __init__(self, seed: int, windows: int, neurons: int = NEURONS):
        self.name, self.seed, self.windows, self.window = "scratch", seed, windows, WINDOW
        sizes = {"hidden_size": 128, "num_hidden_layers": 4}
        self.dense = tiny_llama(seed, intermediate_size=neurons, **sizes)
        self.share = neurons / NEURONS
        self.tokenizer = byte_tokenizer()
        self.tokens = self.own_text.numel()

    @cached_property
    def cut(self) -> dict[str, TextWindows]:
        texts = {"builtin": builtin_text(), "python": second_domain_text()}
        return {name: windows_of(self.tokenizer, text, WINDOW) for name, text in texts.items()}

    @cached_property
    def own_text(self) -> torch.Tensor:
        """Windows [N,L] to train on."""
        return torch.cat([windows.train for windows in self.cut.values()])

    @cached_property
    def texts(self) -> list[Text]:
        texts = [Text(name, windows.held_out, 0) for name, windows in self.cut.items()]
        return [Text(text.name, spread(text, self.windows), 0) for text in texts]

    def losses_in_place(self, model: "PreTrainedModel") -> dict[str, Any]:
        found = super().losses_in_place(model)
        shares = {text: self.share * active for text, active in found["active"].items()}
        return found | {"active": shares}

    def tune(
        self, model: "PreTrainedModel", steps: int, distill: float, **settings: Any
    ) -> list[dict[str, Any]]:
        """Trains all weights in place, by the text alone -> the log."""
        chosen: dict[str, Any] = {"batch_size": 8, "lr": 2e-3}
        chosen |= {"target_active": hold_target(model), "seed": self.seed} | settings
        windows = TextWindows(self.own_text, self.own_text[:1])
        return fine_tune(model, windows, TrainSettings(steps, **chosen))
