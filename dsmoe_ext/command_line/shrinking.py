"""The commands that make the experts smaller: `dsmoe prune`, `dsmoe compress`."""

from typing import Annotated

import typer

from . import console
from .options import (
    DataOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    WindowOption,
)


def prune(
    model: ModelArgument,
    out: OutArgument,
    keep: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the routed experts to keep.")
    ] = 0.75,
    data: DataOption = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to measure on.")] = 4096,
    window: WindowOption = 512,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Drop the experts that a task's text uses least; the model gets smaller.

    Give the task's own text with --data. Every layer loses equally many experts.

    Example: `dsmoe prune smollm2-half smollm2-task --keep 0.75 --data task.txt`
    """
    from ..files import atomic_directory
    from ..loading import load_model, need_tokenizer, save_model
    from ..training.sources import BUILTIN, Source, read_windows

    with atomic_directory(out, overwrite, reads=[model]) as folder:
        with console.stage("Loading"):
            loaded, tokenizer = load_model(model, dtype=dtype.value, device=device, only="sparse")
        source, words = [Source(str(data or BUILTIN))], need_tokenizer(tokenizer, model)
        windows = read_windows(words, source, window, model=loaded)
        ids = windows.train[: max(1, tokens // window)].to(loaded.device)
        from ..offline import expert_use
        from ..offline import prune as drop_experts

        with console.stage("Measuring"), console.expect(ValueError, TypeError):
            pruned = drop_experts(loaded, expert_use(loaded, ids), keep)
        save_model(pruned, tokenizer, folder)
    print(f"wrote {out}")


def compress(
    model: ModelArgument,
    out: OutArgument,
    rank: Annotated[int, typer.Option(min=1, help="Rank of what an expert has of its own.")],
    dtype: DtypeOption = Dtype.auto,
    overwrite: OverwriteOption = False,
) -> None:
    """Keep what the experts have in common once, and of each a residual of low rank.

    For experts of one size (ResMoE). The result is not the same function: look with `dsmoe eval`,
    and win quality back with `dsmoe train`.

    Example: `dsmoe compress smollm2-8 smollm2-8-r48 --rank 48`
    """
    from ..files import atomic_directory
    from ..loading import load_model, model_bytes, save_model

    with atomic_directory(out, overwrite, reads=[model]) as folder:
        with console.stage("Loading"):
            loaded, tokenizer = load_model(model, dtype=dtype.value, only="sparse")
        from ..offline import compress as factor_experts

        before = model_bytes(loaded)
        with console.stage("Compressing"), console.expect(ValueError, TypeError):
            compressed, error = factor_experts(loaded, rank)
        console.say(
            f"{model_bytes(compressed) / before:.1%} of the bytes; squared error {error:.1%} of "
            "the experts' weights"
        )
        save_model(compressed, tokenizer, folder)
    print(f"wrote {out}")
