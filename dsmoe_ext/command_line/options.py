"""Arguments and options that several commands share."""

import enum
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a .gguf file, a hub id such as org/name, or the word smollm2.",
    ),
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model or run in OUT; its other files stay.")
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE|DIR",
        help="UTF-8 text: a file, or a folder of .txt, .md and .rst files. "
        "Without it the English text built into Python (the language reference, 465 kB).",
    ),
]
MixtureOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE[=WEIGHT]",
        help="Text, several times for a mixture: a file or folder (.txt, .md, .rst, .jsonl and "
        ".parquet with a field text), hf:NAME[:CONFIG] from a hub, builtin (English that every "
        "Python has), or self: what the dense model says itself, so that no text is needed.",
    ),
]
TextsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="Text to measure on, several times for several texts: as for calibrate, but not self. "
        "Without it the English text built into Python (the language reference, 465 kB).",
    ),
]
WindowOption = Annotated[
    int, typer.Option("--window", min=2, help="Tokens in a window; windows never overlap.")
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything random.")
]


def finite(value: float | None) -> float | None:
    """A callback for options: nan is within every range, and inf often."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


TargetOption = Annotated[
    float,
    typer.Option(
        "--target-active",
        min=0.01,
        max=1.0,
        callback=finite,
        help="Share of the FFN to use per token.",
    ),
]


def written_sizes(text: str | None) -> str | None:
    """Callback of --expert-sizes: refuses what no FFN of any size could have."""
    if text is not None:
        from ..layout import parse_sizes

        try:
            parse_sizes(text, 2**30)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return text


ExpertSizesOption = Annotated[
    str | None,
    typer.Option(
        "--expert-sizes",
        metavar="SIZES",
        callback=written_sizes,
        help="Sizes of the routed experts, instead of their number or size: neurons (512,256,...), "
        "ratios (2.0,1,...), pairs:4.5,0.5;4,1 (MoDSE) or nested (MatFormer).",
    ),
]


class Dtype(str, enum.Enum):
    """The dtype of weights and computation."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Dtype of the weights; auto: as they are saved.")
]


DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]",
        help="Where to compute; auto: on the GPU if the extension was built for one.",
    ),
]


class Ste(str, enum.Enum):
    """Straight-through modes (method: what the router learns about inactive experts)."""

    active = "active"
    exact = "exact"
    sampled = "sampled"


class Trained(str, enum.Enum):
    """Which parameters learn."""

    all = "all"
    ffn = "ffn"


class Router(str, enum.Enum):
    """How the routers start."""

    dense = "dense"
    paper = "paper"


def numbers(text: str | None, kind: type, option: str) -> list[Any]:
    """A comma-separated list from the command line."""
    if not text:
        return []
    try:
        return [kind(finite(float(part)) if kind is float else part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list like 0.3,0.5", param_hint=option
        ) from None


def decoded(text: str, what: str) -> str:
    """The text, if it is one: Python hides bytes of the command line that are not UTF-8 in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 text") from None
    return text


def standard_input() -> str:
    """All of it, as text."""
    try:
        return decoded(sys.stdin.read(), "standard input")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error.reason}") from None
