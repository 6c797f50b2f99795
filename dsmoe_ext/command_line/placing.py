"""The command that places experts on ranks: `dsmoe place`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import console
from .options import DataOption, DeviceOption, Dtype, DtypeOption, ModelArgument, WindowOption


def place(
    model: ModelArgument,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Ranks to place experts on.")],
    data: DataOption = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to measure on.")] = 4096,
    window: WindowOption = 512,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the experts of every rank here, as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Place every layer's experts on ranks, evenly by parameters and by measured load.

    Loads are measured on text: half of the tokens decide, the other half is what the figures are
    of. Ratios are the largest rank over the mean. A shared expert is on every rank.

    Example: `dsmoe place smollm2-half --ranks 8`
    """
    from ..files import atomic_file, check_file
    from ..loading import load_model, need_tokenizer
    from ..training.sources import BUILTIN, Source, read_windows

    if out:
        check_file(out)
    with console.stage("Loading"):
        loaded, tokenizer = load_model(model, dtype=dtype.value, device=device)
    source, words = [Source(str(data or BUILTIN))], need_tokenizer(tokenizer, model)
    windows = read_windows(words, source, window, model=loaded)
    ids = windows.train[: max(1, tokens // window)].to(loaded.device)
    from ..distributed.load import before_and_after, used_experts
    from ..layers import ffn_layers

    with console.expect(ValueError, TypeError), console.stage("Measuring"):
        layers = ffn_layers(loaded)
        used = used_experts(loaded, ids)
        rows = []
        for ffn, mask in zip(layers, used, strict=True):
            sizes = ffn.sizes[ffn.num_shared :]
            row_bytes = ffn.hidden_size * loaded.dtype.itemsize
            rows.append(before_and_after(mask, sizes, ranks, row_bytes))
    if out:
        with atomic_file(out) as partial:
            partial.write_text(json.dumps([after.placement.ranks for _, after in rows]) + "\n")
    summary = [_summary([row[side] for row in rows]) for side in (0, 1)]
    if as_json:
        print(json.dumps(dict(zip(("before", "after"), summary, strict=True)), indent=1))
        return
    from rich.table import Table

    table = Table(title=f"{len(rows)} layers on {ranks} ranks, {ids.numel():,} tokens")
    table.add_column("largest rank / mean, worst layer")
    for name in ("parameters", "load", "load, mean layer", "ranks a token", "bytes a token"):
        table.add_column(name, justify="right")
    for name, row in zip(("in order", "placed"), summary, strict=True):
        table.add_row(
            name,
            *(f"{row[key]:.3f}" for key in ("parameters", "load", "mean_load")),
            f"{row['ranks_per_token']:.2f}",
            f"{row['bytes_per_token']:,.0f}",
        )
    console.out.print(table)


def _summary(reports: list[Any]) -> dict[str, Any]:
    """The worst layer's ratios, and means over the layers."""

    def mean(values: Iterable[float]) -> float:
        values = list(values)
        return sum(values) / len(values)

    return {
        "parameters": max(report.parameters for report in reports),
        "load": max(report.load for report in reports),
        "mean_load": mean(report.load for report in reports),
        "ranks_per_token": mean(report.ranks_per_token for report in reports),
        "bytes_per_token": mean(report.bytes_per_token for report in reports),
    }
