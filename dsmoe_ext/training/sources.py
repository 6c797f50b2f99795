"""Where text comes from: files, folders, JSONL, Parquet, a data set, or the model itself; mixed.

    --data notes.txt --data wiki.jsonl=3 --data self=2

Each source is named by what stands before the last "=", and weighs what stands behind it (1 if
nothing does): of every 6 tokens above, 1 comes from the notes, 3 from the wiki, 2 from the model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from .data import TextWindows, builtin_text, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF = "self"  # text drawn from the dense model (calibration/own_text.py)
BUILTIN = "builtin"  # the English text that every CPython has
HUB = "hf:"  # hf:NAME or hf:NAME:CONFIG, streamed by the datasets library
TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """One text of a mixture, and its share of it in relation to the others."""

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Of NAME or NAME=WEIGHT; a name that exists as it stands is taken so."""
        name, equals, weight = text.rpartition("=")
        if not equals or Path(text).expanduser().exists():
            return cls(text)
        try:
            value = float(weight)
        except ValueError:
            return cls(text)
        if not 0 < value < float("inf"):
            raise UserError(f"the weight of {name} must be above 0, not {weight}")
        return cls(name, value)

    @property
    def is_path(self) -> bool:
        """Whether the source is a file or folder of the user's."""
        return self.name not in (SELF, BUILTIN) and not self.name.startswith(HUB)

    def documents(self) -> Iterator[str]:
        """The source's documents, as they are read. Errors name the file."""
        if self.name == BUILTIN:
            yield builtin_text()
        elif self.name.startswith(HUB):
            yield from _from_hub(self.name.removeprefix(HUB))
        else:
            for file in _files(Path(self.name).expanduser()):
                yield from _documents_of(file)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        if not files:
            raise UserError(f"no {', '.join(SUFFIXES)} file in {path}")
        return files
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"{path} is neither a file nor a directory")
    raise UserError(f"no such file or directory: {path}")


def _documents_of(file: Path) -> Iterator[str]:
    if file.suffix == ".parquet":
        yield from _from_parquet(file)
        return
    try:
        with open(file, encoding="utf-8-sig") as lines:
            if file.suffix != ".jsonl":
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(line, file, number)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error.reason}") from None


def _text_of(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{file}, line {number}: not a JSON object with a string "text"')
    return text


def _from_parquet(file: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file} needs pyarrow: pip install pyarrow") from None
    table = parquet.ParquetFile(file)
    if "text" not in table.schema_arrow.names:
        raise UserError(f'{file} has no column "text"; it has {table.schema_arrow.names}')
    for batch in table.iter_batches(columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _from_hub(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"{HUB}{name} needs datasets: pip install datasets") from None
    name, _, config = name.partition(":")
    try:
        rows = load_dataset(name, config or None, split="train", streaming=True)
        for row in rows:
            if isinstance(row.get("text"), str):
                yield row["text"]
    except Exception as error:  # whatever the hub, the network or the loader may raise
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{HUB}{name} cannot be read: {first}") from error


def read_windows(
    tokenizer: "PreTrainedTokenizerBase",
    sources: list[Source],
    length: int,
    most_tokens: int | None = None,
    model: "PreTrainedModel | None" = None,
) -> TextWindows:
    """The windows of a mixture, every tenth of each source held out (data.split_windows).

    most_tokens: about so many training tokens in all, shared out by weight; a source that has fewer
    gives what it has. None: all there is, whatever the weights. model: see data.windows_of.
    """
    parts = []
    total = sum(source.weight for source in sources)
    for source in sources:
        wanted = None if most_tokens is None else most_tokens * source.weight / total
        parts.append(_windows_of_source(tokenizer, source, length, wanted, model))
    train = torch.cat([part.train for part in parts])
    held_out = torch.cat([part.held_out for part in parts])
    return TextWindows(train, held_out, parts[0].num_context)


def _windows_of_source(
    tokenizer: "PreTrainedTokenizerBase",
    source: Source,
    length: int,
    wanted: float | None,
    model: "PreTrainedModel",
) -> TextWindows:
    """One source's windows; of a long one, `wanted` training tokens spread evenly through it."""
    texts, seen = [], 0
    for text in source.documents():
        texts.append(text)
        seen += len(text)
        # A stream need not be read to its end: ten characters are more than a token in any
        # language that the tokenizer is made for.
        if wanted is not None and source.name.startswith(HUB) and seen > 10 * wanted:
            break
    text = "\n\n".join(texts)
    if not text.strip():
        raise UserError(f"{source.name} is empty")
    windows = windows_of(tokenizer, text, length, model)
    rows = len(windows.train)
    if wanted is None or rows * length <= wanted:
        return windows
    chosen = torch.linspace(0, rows - 1, max(1, round(wanted / length))).round().long()
    return TextWindows(windows.train[chosen], windows.held_out, windows.num_context)
