"""The command line `dsmoe`. Heavy imports stand inside the commands, so that --help is quick."""

from typing import Annotated, Any

import typer

from ..experiments import app as experiments
from . import console
from .evaluation import evaluate_command
from .options import (
    DataOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ExpertSizesOption,
    MixtureOption,
    ModelArgument,
    OutArgument,
    OverwriteOption,
    Router,
    SeedOption,
    TargetOption,
    WindowOption,
    decoded,
    finite,
    standard_input,
)
from .placing import place
from .report import report
from .shrinking import compress, prune
from .training import demo, train

app = typer.Typer(
    cls=console.Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Make a dense language model sparse: only part of every FFN is computed for each token.

    `dsmoe demo` shows the whole way on a small real model in a few minutes.

    The way by hand: `calibrate` (a dense model → half of the FFN active, no training),
    `train` (a short fine-tuning holds that share and wins quality back), `eval`,
    `generate`. `convert` only cuts the FFN into experts; `merge` makes a
    dense model again.""",
)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"dsmoe {version('dsmoe_ext')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    model: ModelArgument,
    out: OutArgument,
    experts: Annotated[int, typer.Option(min=1, help="Number of routed experts.")] = 8,
    expert_sizes: ExpertSizesOption = None,
    method: Annotated[
        str, typer.Option(help="The router by name: threshold, top_p, top_k, relu, modse, ...")
    ] = "threshold",
    top_k: Annotated[
        int, typer.Option(min=1, help="Experts of every token, of top-k methods.")
    ] = 2,
    balance: Annotated[
        str | None,
        typer.Option(help="Balance loss of training: switch, cv, load_l1. Default: the method's."),
    ] = None,
    partition: Annotated[
        str,
        typer.Option(
            help="Which neurons form an expert: contiguous, random, gate_rows or coactivation."
        ),
    ] = "contiguous",
    data: DataOption = None,
    shared_size: Annotated[
        int, typer.Option(min=0, help="Neurons of an expert that is always on.")
    ] = 0,
    threshold: Annotated[
        float, typer.Option(callback=finite, help="An expert is active above this score.")
    ] = 0.5,
    router_init: Annotated[
        Router,
        typer.Option(help="dense: the converted model computes the same; paper: random routers."),
    ] = Router.dense,
    dtype: DtypeOption = Dtype.auto,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Cut the FFN of a dense model into experts with a router.

    With the default routers every expert is active and the model computes what it did before;
    training then opens the gap. To have a sparse model at once, use `dsmoe calibrate`.

    Example: `dsmoe convert smollm2 smollm2-8 --experts 8`
    """
    from ..files import atomic_directory
    from ..loading import load_model, save_model

    with atomic_directory(out, overwrite, reads=[model]) as folder:
        with console.stage("Loading"):
            dense, tokenizer = load_model(model, dtype=dtype.value, only="dense")
        from ..calibration.orders import neuron_orders
        from ..convert import sparsify
        from ..layout import parse_sizes
        from ..loading import need_tokenizer
        from ..routers import router_class
        from ..training.sources import BUILTIN, Source, read_windows

        with console.stage("Converting"), console.expect(ValueError, TypeError):
            layout: dict[str, Any] = {"num_experts": experts, "shared_size": shared_size}
            if expert_sizes:
                routed = dense.config.get_text_config().intermediate_size - shared_size
                layout["expert_sizes"] = parse_sizes(expert_sizes, routed)
            ids = None
            if partition == "coactivation":
                source = [Source(str(data or BUILTIN))]
                words = need_tokenizer(tokenizer, model)
                ids = read_windows(words, source, 512, model=dense).train
            orders = neuron_orders(dense, partition, ids=ids, seed=seed, **layout)
            converted = sparsify(
                dense,
                **layout,
                permutations=orders,
                method=method,
                top_k=top_k,
                balance=balance or router_class(method).balance_form,
                threshold=threshold,
                router_init=router_init.value,
                seed=seed,
            )
        save_model(converted, tokenizer, folder)
    print(f"wrote {out}")


@app.command()
def calibrate(
    model: ModelArgument,
    out: OutArgument,
    data: MixtureOption = None,
    target_active: TargetOption = 0.5,
    expert_size: Annotated[int, typer.Option(min=1, help="Neurons of a routed expert.")] = 16,
    expert_sizes: ExpertSizesOption = None,
    shared: Annotated[
        float,
        typer.Option(callback=finite, min=0.0, max=1.0, help="Share of the FFN that is always on."),
    ] = 0.25,
    refit: Annotated[
        bool, typer.Option(help="Refit down_proj to the sparse FFN; without, merge stays exact.")
    ] = True,
    method: Annotated[
        str, typer.Option(help="The router: threshold, top_p, top_k or mean_score.")
    ] = "threshold",
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to calibrate on.")] = 65536,
    window: WindowOption = 512,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a model sparse without training, in closed form, on its own text or on yours.

    Without --data the dense model says the text itself. Where you have text like that which the
    model will see, mix it in; every tenth window of it is held out, so that `dsmoe eval` is fair.

    Examples: `dsmoe calibrate smollm2 smollm2-half --target-active 0.5`, or with
    `--data self --data notes/ --data wiki.jsonl=2`
    """
    from ..files import atomic_directory
    from ..loading import load_model
    from ..training.sources import Source

    sources = [Source.parse(text) for text in data or ["self"]]
    reads = [model, *(source.name for source in sources if source.is_path)]
    with atomic_directory(out, overwrite, reads=reads) as folder:
        with console.stage("Loading"):
            loaded, tokenizer = load_model(model, dtype=dtype.value, device=device)
        from ..calibration.layerwise import layout_of
        from .steps import calibrate_on, save_measured
        from .text import mixed_windows

        with console.expect(ValueError, TypeError):  # before minutes go into the text
            layout_of(loaded, target_active, expert_size, expert_sizes, shared)
        windows = mixed_windows(
            loaded, tokenizer, model, sources, tokens=tokens, window=window, seed=seed
        )
        with console.expect(ValueError, TypeError):
            sparse = calibrate_on(
                loaded,
                windows,
                tokens=tokens,
                target_active=target_active,
                expert_size=expert_size,
                expert_sizes=expert_sizes,
                shared=shared,
                refit=refit,
                method=method,
                seed=seed,
            )
        save_measured(sparse, tokenizer, folder, windows, sources)
    print(f"wrote {out}")


@app.command()
def merge(
    model: ModelArgument,
    out: OutArgument,
    dtype: DtypeOption = Dtype.auto,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn a converted model back into the dense one, without routers.

    What was only converted, or calibrated with --no-refit, gives its weights back bit for bit.

    Example: `dsmoe merge smollm2-8 smollm2-dense`
    """
    from ..files import atomic_directory
    from ..loading import load_model, save_model

    with atomic_directory(out, overwrite, reads=[model]) as folder:
        with console.stage("Loading"):
            loaded, tokenizer = load_model(model, dtype=dtype.value, only="sparse")
        from ..convert import merge as merge_model

        with console.stage("Merging"), console.expect(ValueError, TypeError):
            dense = merge_model(loaded)
        save_model(dense, tokenizer, folder)
    print(f"wrote {out}")


@app.command()
def quantize(
    model: ModelArgument,
    out: OutArgument,
    bits: Annotated[int, typer.Option(help="8 or 4: bits of a weight.")] = 8,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale: 32, or a multiple of 64; 0: a scale per output "
            "channel. Without it 0 for 8 bits, 32 for 4."
        ),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option(help="Scales alone, or scales and mins (4 bits without it).")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Round to the nearest code, without a text.")
    ] = False,
    data: MixtureOption = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to round on.")] = 16384,
    window: WindowOption = 512,
    dtype: DtypeOption = Dtype.auto,
    overwrite: OverwriteOption = False,
) -> None:
    """Round the experts of a sparse model to 8 or 4 bits: faster on a CPU, and smaller.

    What rounding a weight does to the output is made up for by others, on a little text, of which
    every tenth window is held out. Attention and embeddings stay as they are.

    Example: `dsmoe quantize smollm2-half smollm2-half-q8 --bits 8`
    """
    from ..files import atomic_directory
    from ..loading import load_model, save_model
    from ..quantization.model import quantize as quantize_model
    from ..training.sources import BUILTIN, Source

    sources = [Source.parse(text) for text in data or [BUILTIN]]
    reads = [model, *(source.name for source in sources if source.is_path)]
    with atomic_directory(out, overwrite, reads=reads) as folder:
        with console.stage("Loading"):
            loaded, tokenizer = load_model(model, dtype=dtype.value, only="sparse")
        ids, windows = None, None
        if not plain:
            from .steps import save_measured, spread_windows
            from .text import mixed_windows

            windows = mixed_windows(
                loaded, tokenizer, model, sources, tokens=tokens, window=window, seed=0
            )
            ids = spread_windows(windows, tokens)
        with console.expect(ValueError, TypeError):
            quantize_model(loaded, bits, group_size, symmetric, token_ids=ids)
        if windows:
            save_measured(loaded, tokenizer, folder, windows, sources)
        else:
            save_model(loaded, tokenizer, folder)
    print(f"wrote {out}")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 100,
    temperature: Annotated[
        float,
        typer.Option(
            callback=finite,
            min=0.0,
            help="0: always the likeliest token; 1: sample as the model says.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(callback=finite, min=0.0, max=1.0, help="Sample from this mass.")
    ] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a question to an instruct model.")
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(callback=finite, help="Set every layer's threshold for this run."),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the step first: takes a minute, pays on long texts."
        ),
    ] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Continue a text. The text goes to standard output, the speed to standard error.

    Example: `dsmoe generate smollm2-half --chat "Why is the sky blue?"`
    """
    from ..loading import load_model, need_tokenizer

    text = standard_input() if prompt == "-" else decoded(prompt, "the prompt")
    with console.stage("Loading"):
        loaded, tokenizer = load_model(model, dtype=dtype.value, device=device)
    need_tokenizer(tokenizer, model)
    from .steps import generate_text

    generate_text(
        loaded,
        tokenizer,
        text,
        max_new_tokens,
        chat=chat,
        threshold_value=threshold,
        compiled=compiled,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


def _add_benchmarks() -> None:
    """`dsmoe bench ...`: the benchmarks that this installation has."""
    try:
        from ..benchmarks import app as benchmarks
    except ImportError:
        return
    app.add_typer(benchmarks, name="bench")


app.command(name="eval")(evaluate_command)
app.command()(train)
app.command()(demo)
app.command()(place)
app.command()(prune)
app.command()(report)
app.command()(compress)
app.add_typer(experiments, name="experiment")
_add_benchmarks()


def main() -> None:
    """Entry point of the command."""
    console.prepare_streams()
    console.stop_on_terminate()
    app(prog_name="dsmoe")
