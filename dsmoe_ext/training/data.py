"""Text → token windows, with every tenth window held out all through the text.

Perplexity differs by a factor of two from place to place in one text, so the last part of it is
no measure for the rest: the held-out windows are spread evenly.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import torch

from ..command_line.console import say
from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class TextWindows:
    """Windows of one text: train [N,L] and held_out [M,L] int64; no token is in both.

    num_context is the number of tokens at the front of each window (0, or 1 where the tokenizer
    starts every text with a BOS) that are given, never predicted.
    """

    train: torch.Tensor
    held_out: torch.Tensor
    num_context: int = 0

    @property
    def length(self) -> int:
        return self.train.shape[1]

    def digest(self) -> str:
        """Names the data in a checkpoint, so that a run is not resumed on other data."""
        text = hashlib.sha256()
        for part in (self.train, self.held_out):
            text.update(part.numpy().tobytes())
        return text.hexdigest()[:16]


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[torch.Tensor, int | None]:
    """Token ids [N] int64 of a text without special tokens, and the BOS that belongs in front."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    front = tokenizer("a")["input_ids"][:1]
    bos = tokenizer.bos_token_id
    return torch.tensor(ids, dtype=torch.int64), bos if bos is not None and front == [bos] else None


def split_windows(ids: torch.Tensor, length: int = 512, bos: int | None = None) -> TextWindows:
    """Cuts ids [N] into windows of `length` tokens, BOS included; windows 9, 19, 29.. are held out.

    A text of fewer than ten windows gives up its last one, so that both parts exist.
    """
    if length < 2:
        raise UserError(f"a window needs at least 2 tokens, not {length}")
    step = length - (bos is not None)
    num = ids.numel() // step
    if num < 2:
        raise UserError(
            f"the text has {ids.numel()} tokens; two windows of {length} need {2 * step}: "
            "give more text or a smaller --window"
        )
    windows = ids[: num * step].view(num, step)
    if bos is not None:
        windows = torch.cat([torch.full((num, 1), bos), windows], dim=1)
    held_out = torch.zeros(num, dtype=torch.bool)
    held_out[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
    if not held_out.any():
        held_out[-1] = True
    return TextWindows(windows[~held_out], windows[held_out], int(bos is not None))


def windows_of(
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    length: int = 512,
    model: "PreTrainedModel | None" = None,
) -> TextWindows:
    """The windows of a text, with a BOS in front of each where the tokenizer is used to one.

    With a model it is an error if the tokenizer has tokens that the model has not.
    """
    ids, bos = tokenize(tokenizer, text)
    if model is not None:
        check_tokens(model, tokenizer, ids)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            say(f"note: windows of {length} tokens are longer than the model's {limit} positions")
    return split_windows(ids, length, bos)


def check_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", ids: torch.Tensor
) -> None:
    """Refuses token ids (int64) for which the model has no embedding."""
    num = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and (largest := int(ids.max())) >= num:
        raise UserError(
            f"the tokenizer's token {largest} ({tokenizer.convert_ids_to_tokens(largest)}) is "
            f"beyond the model's {num} embeddings: the two do not belong together"
        )


def builtin_text() -> str:
    """465 kB of English that every CPython has: the language reference behind help()."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


# Modules in pure Python, old enough to be everywhere; together about 40,000 tokens.
_SOURCE_MODULES = ("argparse", "textwrap", "fractions", "statistics")


def second_domain_text() -> str:
    """Another domain: source code of the standard library. No calibration uses it, and no training
    but that of experiments.scratch."""
    sources = []
    for name in _SOURCE_MODULES:
        spec = importlib.util.find_spec(name)
        get_source = getattr(spec.loader, "get_source", None) if spec else None
        source = get_source(name) if get_source else None
        if source:
            sources.append(source)
    return "\n\n".join(sources)


def prose_text() -> str:
    """A third domain, used by no calibration or training: the first four chapters of Lewis
    Carroll's Alice's Adventures in Wonderland (1865, in the public domain), a line a paragraph."""
    return (resources.files("dsmoe_ext.demo") / "alice.txt").read_text(encoding="utf-8")
