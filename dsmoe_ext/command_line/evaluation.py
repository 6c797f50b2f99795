"""The command `dsmoe eval`."""

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    TextsOption,
    WindowOption,
    numbers,
)


def evaluate_command(
    model: ModelArgument,
    data: TextsOption = None,
    wikitext: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|hub",
            help="Also WikiText-2 as the field measures it (all windows of 2048): its raw test "
            "file, or the word hub.",
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also the KL divergence to this model.")
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            "--sweep",
            "--thresholds",
            metavar="T,T,...",
            help="Also evaluate with every layer's threshold (or top-p mass, k, prefix) at these.",
        ),
    ] = None,
    window: WindowOption = 512,
    limit: Annotated[int, typer.Option(min=0, help="At most so many windows; 0: all.")] = 0,
    every_window: Annotated[
        bool, typer.Option("--every-window", help="All windows, not the held-out tenth.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 1,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Active share by layer, experts per token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Perplexity, active share and speed on held-out text, or on several texts.

    Perplexity is exp of the mean negative log-likelihood per predicted token. The text is cut into
    windows of --window tokens, every tenth is used, each stands alone: its first token is context,
    the others are predicted from those before them in the window.

    Example: `dsmoe eval smollm2-half --thresholds 0.3,0.5,0.7`
    """
    values = numbers(thresholds, float, "--sweep")
    from ..loading import load_model, need_tokenizer

    with console.stage("Loading"):
        loaded, tokenizer = load_model(model, dtype=dtype.value, device=device)
        taught = load_model(teacher, dtype=dtype.value, device=device)[0] if teacher else None
    from .steps import evaluation_rows, print_evaluations
    from .text import texts_to_measure

    texts = texts_to_measure(
        loaded,
        need_tokenizer(tokenizer, model),
        data,
        wikitext,
        window=window,
        limit=limit,
        every_window=every_window,
    )
    rows = evaluation_rows(loaded, texts, values, batch_size=batch_size, teacher=taught)
    if as_json:
        from ..files import json_text

        print(json_text(rows, indent=1))
    else:
        print_evaluations(rows, per_layer)
