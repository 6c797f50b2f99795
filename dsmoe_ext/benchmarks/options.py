"""What the commands under `dsmoe bench` ask for alike, and what it means."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dsmoe_ext.command_line.options import finite, numbers
from dsmoe_ext.errors import UserError

ShapeOption = Annotated[str, typer.Option(help="Hidden and intermediate size, H,I.")]
ExpertsOption = Annotated[int, typer.Option(min=1, help="Number of equal experts.")]
SizesOption = Annotated[
    str | None, typer.Option("--expert-sizes", help="Sizes instead, as N,N,...")
]
ActiveOption = Annotated[str, typer.Option(help="Active fractions of the experts.")]
TokensOption = Annotated[str, typer.Option(help="Numbers of tokens.")]
DtypeOption = Annotated[str, typer.Option(help="bf16, fp32, fp16; several with commas.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads; torch's number if left out.")
]
BudgetOption = Annotated[float, typer.Option(callback=finite, help="Seconds a case.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OutOption = Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png.")]


def sizes_of(shape: str, experts: int, expert_sizes: str | None) -> tuple[int, list[int]]:
    """Hidden size and the experts' sizes, from the options."""
    hidden_size, intermediate_size = numbers(shape, int, "--shape")
    sizes = numbers(expert_sizes, int, "--expert-sizes")
    if not sizes:
        if intermediate_size % experts:
            raise UserError(
                f"{experts} experts do not divide {intermediate_size}: use --expert-sizes"
            )
        sizes = [intermediate_size // experts] * experts
    return hidden_size, sizes


def dtypes_of(text: str) -> list[Any]:
    import torch

    names = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    unknown = [name for name in text.split(",") if name not in names]
    if unknown:
        raise UserError(f"dtype must be of {', '.join(names)}, but is {unknown[0]!r}")
    return [names[name] for name in text.split(",")]


def describe_sizes(sizes: list[int]) -> str:
    if len(set(sizes)) == 1:
        return f"{len(sizes)} x {sizes[0]}"
    if len(set(sizes[1:])) == 1:
        return f"{sizes[0]} + {len(sizes) - 1} x {sizes[1]}"
    return ", ".join(map(str, sizes))
