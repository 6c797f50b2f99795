"""WikiText-2 as the field measures it, so that a perplexity can stand beside published ones.

The convention of GPTQ and what followed it: the rows of the raw test split joined by two line
ends, tokenised once, cut into windows of 2048 that do not overlap, the mean over all of them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from .data import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 2048
HUB_NAME = "Salesforce/wikitext"


def wikitext_windows(
    tokenizer: "PreTrainedTokenizerBase", path: str | Path | None = None
) -> tuple[torch.Tensor, int]:
    """(windows [N,2048] int64, tokens at the front of each that are given) of the test split.

    path: the raw test file (wiki.test.raw, wikitext-2-raw-test.txt); None asks the hub, through the
    datasets library. A tokenizer that starts texts with a BOS gets one in the first window only, as
    in the convention.
    """
    rows = _rows_of(Path(path)) if path else _rows_of_hub()
    ids, bos = tokenize(tokenizer, "\n\n".join(rows))
    if bos is not None:
        ids = torch.cat([torch.tensor([bos]), ids])
    num = len(ids) // WINDOW
    if not num:
        raise UserError(f"{path} has {len(ids)} tokens, less than one window of {WINDOW}")
    return ids[: num * WINDOW].view(num, WINDOW), 0


def _rows_of(path: Path) -> list[str]:
    """The rows of the data set from its raw file: a line with its end, or nothing."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if lines[-1] == "":
        lines.pop()
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _rows_of_hub() -> list[str]:
    try:
        from datasets import load_dataset

        return load_dataset(HUB_NAME, "wikitext-2-raw-v1", split="test")["text"]
    except Exception as error:  # no library, no network, no such data set
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"WikiText-2 cannot be fetched ({first}); give the raw test file: --wikitext FILE"
        ) from error
