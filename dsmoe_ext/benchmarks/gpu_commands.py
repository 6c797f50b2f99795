"""`dsmoe bench gpu` and `gpu-model`: the CUDA kernels' time, measured and predicted."""

from pathlib import Path
from typing import Annotated

import typer

from dsmoe_ext.benchmarks.options import (
    ActiveOption,
    ExpertsOption,
    ShapeOption,
    SizesOption,
    TokensOption,
    describe_sizes,
    sizes_of,
)

app = typer.Typer()


@app.command()
def gpu(
    only: Annotated[
        str, typer.Option(help="Of check, ceilings, time, kernels.")
    ] = "check,ceilings,time,kernels",
    device: Annotated[str, typer.Option(help="cuda, or cpu: for check alone.")] = "cuda",
    small: Annotated[bool, typer.Option("--small", help="check a tiny layer only")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file, written after every part.")] = None,
) -> None:
    """Everything to know of a GPU in one go: right at full size, ceilings, times, kernels.

    Takes about eight minutes. docs/gpu.md says what to make of it; gpu-model --calibrated reads it.
    """
    import torch

    from dsmoe_ext.benchmarks.gpu_run import PARTS, run
    from dsmoe_ext.errors import UserError
    from dsmoe_ext.loading import choose_device

    wanted = only.split(",")
    if not set(wanted) <= set(PARTS):
        raise UserError(f"--only must be of {', '.join(PARTS)}, but is {only!r}")
    if choose_device(device) == "cpu" and wanted != ["check"]:
        raise UserError("--device cpu can only check: add --only check")
    torch.backends.cuda.matmul.allow_tf32 = False
    run(wanted, device, small, out)


@app.command("gpu-model")
def gpu_model(
    gpu: Annotated[
        str, typer.Option(help="a100, h100, h200, l40s, 5090, or h100-mma: without wgmma.")
    ] = "a100",
    calibrated: Annotated[
        Path | None, typer.Option(help="What `dsmoe bench gpu --out` wrote: rates as measured.")
    ] = None,
    datasheet: Annotated[
        bool, typer.Option("--datasheet", help="boost clocks and peak rates, as if they held")
    ] = False,
    shape: ShapeOption = "4096,11008",
    experts: ExpertsOption = 8,
    expert_sizes: SizesOption = None,
    active: ActiveOption = "0.375",
    tokens: TokensOption = "1,8192",
    trace: Annotated[
        Path | None,
        typer.Option(
            help='JSON, {"active": [[experts of token 0], ...]}: instead of random pairs.'
        ),
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="instead of the forward")] = False,
    dtype: Annotated[str, typer.Option(help="bf16, tf32 or fp32.")] = "bf16",
    saved: Annotated[
        bool, typer.Option("--saved", help="activations kept for the backward, or read by it")
    ] = False,
) -> None:
    """Predict the CUDA kernels' time; beside it the measured time, where a GPU is present.

    From the rates that such chips hold (--datasheet: those printed), the tiles that the kernels
    would run, and the instructions and bytes of a tile, counted while the interpreter of the tests
    ran them. Forward, up to 16 tokens decode, or backward: all outputs; predicted only.
    """
    import torch

    from dsmoe_ext.benchmarks import gpu_load, gpu_model
    from dsmoe_ext.benchmarks.gpu_report import prediction_table
    from dsmoe_ext.benchmarks.gpu_specs import GPUS, read_calibration, sustained
    from dsmoe_ext.command_line.console import expect
    from dsmoe_ext.command_line.console import out as console
    from dsmoe_ext.command_line.options import numbers
    from dsmoe_ext.errors import UserError

    for option, value, known in (("--gpu", gpu, GPUS), ("--dtype", dtype, gpu_load.DTYPES)):
        if value not in known:
            raise UserError(f"{option} must be of {', '.join(known)}, but is {value!r}")
    hidden_size, sizes = sizes_of(shape, experts, expert_sizes)
    if trace:
        loads = [gpu_load.read_trace(trace, len(sizes))]
    else:
        loads = [
            gpu_load.draw(t, len(sizes), fraction)
            for t in numbers(tokens, int, "--tokens")
            for fraction in numbers(active, float, "--active")
        ]
    chip = GPUS[gpu]
    if calibrated:
        with expect(OSError, KeyError, ValueError, TypeError):
            chip = read_calibration(chip, calibrated)
    elif not datasheet:
        chip = sustained(chip)
    for mask in loads:
        load = gpu_load.Load(hidden_size, tuple(sizes), mask, backward, dtype, saved)
        kernels = gpu_model.predict(chip, load)
        is_measured = torch.cuda.is_available() and not backward and not saved
        measured = gpu_model.measure(load) if is_measured else None
        console.print(prediction_table(chip, load, describe_sizes(sizes), kernels, measured))
