"""--data of calibrate, train and demo as windows of tokens: files, own text of the model, both."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..calibration.own_text import sample_text
from ..errors import UserError
from ..loading import need_tokenizer
from ..training.data import TextWindows
from ..training.evaluate import supports_bf16
from ..training.sources import BUILTIN, SELF, Source, read_windows
from ..training.wikitext import wikitext_windows
from . import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a model says drifts away from sense as it gets longer, and the growing cache slows it down.
OWN_LENGTH = 256


@dataclass(frozen=True)
class Text:
    """A text to measure on: windows ids [N,L], of which the first `context` tokens are given."""

    name: str
    ids: torch.Tensor
    context: int = 0


def texts_to_measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: list[str] | None,
    wikitext: Path | None,
    *,
    window: int,
    limit: int = 0,
    every_window: bool = False,
) -> list[Text]:
    """The texts of `dsmoe eval`: each source's held-out windows, and WikiText-2 as the field cuts
    it. limit: at most so many windows of each; 0: all."""
    texts = []
    for name in data or ([] if wikitext else [BUILTIN]):
        if name == SELF:
            raise UserError("a model's own text is no measure of it; name another text")
        windows = read_windows(tokenizer, [Source(name)], window, model=model)
        ids = torch.cat([windows.train, windows.held_out]) if every_window else windows.held_out
        texts.append(Text(Path(name).name, ids, windows.num_context))
    if wikitext:
        ids, context = wikitext_windows(tokenizer, None if str(wikitext) == "hub" else wikitext)
        texts.append(Text("WikiText-2", ids, context))
    return [Text(text.name, text.ids[: limit or None], text.context) for text in texts]


def mixed_windows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    sources: list[Source],
    *,
    tokens: int,
    window: int,
    seed: int,
) -> TextWindows:
    """About `tokens` training tokens of the sources, by their weights.

    model: the dense model, which says the text of the source "self"; name: what the user calls it.
    """
    total = sum(source.weight for source in sources)
    own = sum(source.weight for source in sources if source.name == SELF) / total
    others = [source for source in sources if source.name != SELF]
    parts = []
    if others:
        tokenizer = need_tokenizer(tokenizer, name)
        wanted = round(tokens * (1 - own))
        parts.append(read_windows(tokenizer, others, window, wanted, model=model))
    if own:
        text = own_windows(model, round(tokens * own), window, seed)
        parts.append(TextWindows(text, text[:0]))
    train = torch.cat([part.train for part in parts])
    held_out = torch.cat([part.held_out for part in parts])
    return TextWindows(train, held_out, parts[0].num_context)


def own_windows(model: "PreTrainedModel", tokens: int, window: int, seed: int) -> torch.Tensor:
    """Windows [N, window] of about `tokens` tokens of the model's own text; all to learn from.

    It is drawn in rows of OWN_LENGTH tokens; a longer window holds several, like documents that are
    packed for training.
    """
    length = min(window, OWN_LENGTH)
    wanted = max(1, round(tokens / window)) * window
    rows = -(-wanted // length)
    device = next(model.parameters()).device
    if supports_bf16(device) and model.dtype == torch.float32:
        model = copy.deepcopy(model).to(torch.bfloat16)  # reading the weights is what takes time
    with console.progress("Sampling text", rows * (length - 1), "tokens") as advance:
        text = sample_text(model, rows, length, seed=seed, advance=advance)
    return text.flatten()[:wanted].view(-1, window)
