"""The commands of `dsmoe experiment`."""

import functools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..command_line.options import numbers
from .record import Record
from .rows import Rows

if TYPE_CHECKING:
    from .bench import Bench
    from .methods import Method

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure the method itself: one command per table of docs/experiments.md. Every row is "
    "written to OUT at once; the same command goes on where it was stopped.",
)

Model = Annotated[str, typer.Option(help="The dense model.")]
Target = Annotated[float, typer.Option(min=0.01, max=1.0, help="Active share of the FFN.")]
Tokens = Annotated[int, typer.Option(min=64, help="Of the model's own text, to calibrate on.")]
Only = Annotated[str | None, typer.Option(help="Methods whose names hold one of these, by commas.")]
Windows = Annotated[int, typer.Option(min=0, help="Windows to measure on, of each text; 0: all.")]
WikiText = Annotated[
    Path | None, typer.Option("--wikitext", help="The raw test file of WikiText-2.")
]
Seeds = Annotated[str, typer.Option(help="Seeds of text and grouping, separated by commas.")]
Out = Annotated[Path, typer.Option("--out", help="The folder of the results.")]


def _benches(
    model: str, tokens: int, windows: int, wikitext: Path | None, seeds: str, out: Path
) -> Iterator["Bench"]:
    from .bench import Bench

    drawn = Record(out / "own_text.jsonl")
    for seed in numbers(seeds, int, "--seeds"):
        yield Bench(model, tokens, 512, windows, wikitext, seed, drawn)


def _methods(only: str | None) -> dict[str, "Method"]:
    """The methods whose names hold one of the words of `only`; all without."""
    from .methods import METHODS

    words = [word.strip() for word in (only or "").split(",") if word.strip()]
    for word in words:
        if not any(word in name for name in METHODS):
            raise typer.BadParameter(f"no method's name holds {word!r}: {', '.join(METHODS)}")
    return {n: m for n, m in METHODS.items() if not words or any(word in n for word in words)}


@app.command()
def ladder(
    model: Model = "smollm2",
    target_active: Target = 0.5,
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """What each step costs: oracle neurons, oracle experts, router, refit."""
    from ..models.adopt import gated_mlps, text_model
    from .oracle import masked_ffns, strongest_experts, strongest_neurons

    table = Rows(out, "ladder")
    for bench in _benches(model, tokens, windows, wikitext, seeds, out):

        def oracle(masks: Any, bench: "Bench" = bench) -> dict[str, Any]:
            with masked_ffns(bench.dense, masks):
                losses = bench.losses_in_place(bench.dense)
            return losses | {"active": dict.fromkeys(losses["active"], target_active)}

        def oracle_experts(bench: "Bench" = bench) -> dict[str, Any]:
            sparse, _ = bench.calibrate(target_active, refit=False)
            return oracle(strongest_experts(sparse, target_active))

        layers = len(gated_mlps(text_model(bench.dense)))
        neurons = [strongest_neurons(target_active)] * layers
        table.add_dense(bench, target=target_active)
        table.add(bench, "oracle neurons", functools.partial(oracle, neurons), target=target_active)
        table.add(bench, "oracle experts", oracle_experts, target=target_active)
        table.add_calibrated(bench, "router", target_active, refit=False)
        table.add_calibrated(bench, "router, refit", target_active)
    table.show(f"perplexity / dense @ active share, target {target_active:g}")


@app.command()
def static(
    model: Model = "smollm2",
    target_active: Target = 0.5,
    shared: Annotated[str, typer.Option(help="Shares that are always on.")] = "0,0.125,0.25,0.375",
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """Does routing earn its keep? Against the strongest neurons alone, refitted the same way."""
    table = Rows(out, "static")
    shares = [*numbers(shared, float, "--shared"), target_active]
    for bench in _benches(model, tokens, windows, wikitext, seeds, out):
        table.add_dense(bench, target=target_active)
        for share in shares:
            name = f"shared {share:g}" if share < target_active else "static: strongest + refit"
            table.add_calibrated(bench, name, target_active, shared=share)
    table.show(f"perplexity / dense @ active share, target {target_active:g}")


@app.command()
def curve(
    model: Model = "smollm2",
    targets: Annotated[str, typer.Option(help="Active shares.")] = "0.25,0.375,0.5,0.625,0.75",
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """Perplexity over the active share, routed (half of it always on) and static."""
    table = Rows(out, "curve")
    for bench in _benches(model, tokens, windows, wikitext, seeds, out):
        table.add_dense(bench)
        for target in numbers(targets, float, "--targets"):
            for kind, share in (("routed", target / 2), ("static", target)):
                table.add_calibrated(bench, f"{kind} {target:g}", target, shared=share)
    table.show("perplexity / dense @ active share")
    table.draw()


@app.command()
def cuts(
    model: Model = "smollm2",
    targets: Annotated[str, typer.Option(help="Active shares.")] = "0.25,0.5,0.75",
    steps: Annotated[
        int, typer.Option(min=0, help="Of training behind it, of two windows each; 0: none.")
    ] = 0,
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """Do finer experts keep more, as XMoE says, and do unequal ones, as MoDSE says?

    FFNs are cut whole, with no shared part, and top-p routers found in closed form, which meet a
    share with experts of any sizes. Trained they learn from the dense model's predictions.
    """
    table = Rows(out, "cuts")
    for bench in _benches(model, tokens, windows, wikitext, seeds, out):
        table.add_dense(bench)
        neurons = bench.dense.config.get_text_config().intermediate_size
        cuts: dict[str, dict[str, Any]] = {
            f"experts of {size}": {"expert_size": size}
            for size in (max(1, neurons // experts) for experts in (8, 64, 512))
        }
        cuts["4 pairs"] = {"expert_sizes": "pairs:4.5,0.5;4,1;3,2;2.5,2.5"}
        for target in numbers(targets, float, "--targets"):
            for name, cut in cuts.items():
                whole = cut | {"shared": 0.0, "method": "top_p"}
                row = f"top_p, {name}, {target:g}"
                table.add_calibrated(bench, row, target, **whole)
                if steps:
                    trained = functools.partial(bench.losses_tuned, steps, 1.0, target, **whole)
                    table.add(bench, f"{row}, trained", trained, steps=steps)
    table.show("perplexity / dense @ active share")
    table.draw()


@app.command("tokens")
def tokens_by_domain(
    model: Model = "smollm2",
    target_active: Target = 0.5,
    counts: Annotated[str, typer.Option(help="Tokens to calibrate on.")] = "4096,16384,65536",
    sources: Annotated[
        str, typer.Option(help="Texts to calibrate on, as in --data; + joins equal parts.")
    ] = "self,builtin,self+builtin",
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """How much text, and which? Calibrated on each source at each size, measured on every text."""
    table = Rows(out, "tokens")
    sizes = numbers(counts, int, "--counts")
    for bench in _benches(model, max(sizes), windows, wikitext, seeds, out):
        table.add_dense(bench)
        for source in sources.split(","):
            for size in sizes:
                name = f"{source}, {size:,}"
                text = functools.partial(bench.text, source, size)
                table.add_calibrated(bench, name, target_active, text)
    table.show(f"perplexity / dense @ active share, target {target_active:g}")


@app.command()
def tuned(
    model: Model = "smollm2",
    target_active: Target = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Of two windows each.")] = 80,
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """What does training bring, and would the dense model have gained the same?

    All rows are trained on the same tokens, of the model's own text: on the text itself (CE) or on
    the dense model's predictions (KL). Also from other starts than calibration, and with other
    straight-through gradients (STE) of the router.
    """
    from .methods import METHODS, Trained

    table = Rows(out, "tuned")
    for bench in _benches(model, tokens, windows, wikitext, seeds, out):
        calibrated = {"target_active": target_active}
        table.add_dense(bench, target=target_active)
        table.add_calibrated(bench, "calibrated", target_active)
        for name, distill, options in (
            ("dense, CE", 0.0, {}),
            ("static, KL", 1.0, calibrated | {"shared": target_active}),
            ("calibrated, CE", 0.0, calibrated),
            ("calibrated, KL", 1.0, calibrated),
            ("calibrated, KL, exact STE", 1.0, calibrated | {"ste": "exact"}),
            ("calibrated, KL, sampled STE", 1.0, calibrated | {"ste": "sampled"}),
            ("calibrated, KL, router fixed", 1.0, calibrated | {"settings": {"router_lr": 0.0}}),
        ):
            measurement = functools.partial(bench.losses_tuned, steps, distill, **options)
            table.add(bench, name, measurement, steps=steps, target=target_active)
        for name in ("DSMoE 8 experts", "DSMoE 8, paper's start", "LLaMA-MoE 8 random"):
            trained = Trained(METHODS[name], bench, target_active, steps, distill=1.0)
            knob = next(iter(trained.method.at), None)
            losses = functools.partial(trained.losses, knob)
            what = {"steps": steps, "target": target_active, **trained.what}
            table.add(bench, f"{name}, KL", losses, **what)
    table.show(f"perplexity / dense @ active share, target {target_active:g}, {steps} steps")
    table.show("the same / the dense model trained on the same tokens", "dense, CE")


@app.command()
def methods(
    model: Model = "smollm2",
    target_active: Target = 0.5,
    only: Only = None,
    steps: Annotated[int, typer.Option(min=1, help="Of two windows each.")] = 80,
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """DSMoE, XMoE, MoDSE and their neighbours: the same start, tokens and steps.

    FFNs and routers learn from the dense model's predictions and the text in equal parts; then the
    method's knob is turned. For comparison: the dense model after the same training, and calibrated
    ones, with each router that is known in closed form, before and after it. Only threshold's
    share is held in training: of top_p the mass stays, of the others k.
    """
    from ..calibration.choice import METHODS as calibrated
    from .methods import SHARE, Trained

    table, chosen = Rows(out, "methods"), _methods(only)
    for bench in _benches(model, tokens, windows, wikitext, seeds, out):
        what = {"target": target_active, "steps": steps}
        table.add_dense(bench, target=target_active)
        trained_alike = functools.partial(bench.losses_tuned, steps, SHARE)
        table.add(bench, "dense, trained", trained_alike, **what)
        for router in calibrated:
            table.add_calibrated(bench, f"calibrated, {router}", target_active, method=router)
            measurement = functools.partial(trained_alike, target_active, method=router)
            name = f"calibrated, {router}, trained"
            table.add(bench, name, measurement, method=router, **what)
        for name, method in chosen.items():
            Trained(method, bench, target_active, steps).add_rows(table, name, **what)
    table.show(f"perplexity / dense @ active share, {steps} steps")
    table.draw()


@app.command()
def scratch(
    target_active: Target = 0.5,
    only: Only = None,
    steps: Annotated[int, typer.Option(min=1, help="Of 2048 bytes each.")] = 400,
    windows: Windows = 32,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """The same methods in a small model that was never dense: trained from scratch, on bytes.

    Beside the dense model stands one with as many neurons as the target leaves on: the control.
    """
    from .methods import Trained
    from .scratch import NEURONS, Scratch

    table = Rows(out, "scratch")
    for seed in numbers(seeds, int, "--seeds"):
        bench, what = Scratch(seed, windows), {"target": target_active, "steps": steps}
        for name, share in (("dense", 1.0), ("dense, fewer neurons", target_active)):
            dense = Scratch(seed, windows, round(share * NEURONS))
            losses = functools.partial(dense.losses_tuned, steps, 0.0)
            table.add(dense, name, losses, share=share, **what)
        for name, method in _methods(only).items():
            Trained(method, bench, target_active, steps, 0.0).add_rows(table, name, **what)
    table.show(f"perplexity / dense @ active share, {steps} steps")
    table.draw()


@app.command()
def baselines(
    model: Model = "smollm2",
    target_active: Annotated[
        float, typer.Option(min=0.34, max=0.99, help="Share of the FFN's work, or of its bytes.")
    ] = 0.5,
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """The same share of the FFN by other people's recipes: FLAP, TEAL, CATS, CMoE.

    All see the same text as calibrate. TEAL and CATS save bytes, each token its own: what several
    tokens read together stands in a second table. CMoE also with our partition, router and refit
    in place of its own.
    """
    from .baselines import batches_table, losses_calibrated, losses_fitted, recipes

    table = Rows(out, "baselines")
    for bench in _benches(model, tokens, windows, wikitext, seeds, out):
        what = {"target": target_active}
        table.add_dense(bench, **what)
        for name, options in (
            ("ours", {}),
            ("static: strongest + refit", {"shared": target_active}),
        ):
            ours = functools.partial(losses_calibrated, bench, target_active, **options)
            table.add(bench, name, ours, **what, **options)
        for name, fit in recipes(target_active).items():
            theirs = functools.partial(losses_fitted, bench, fit, target_active)
            table.add(bench, name, theirs, **what)
    table.show(f"perplexity / dense @ active share, target {target_active:g}")
    print("\n" + batches_table(table.rows))


@app.command()
def paper(
    model: Model = "smollm2",
    target_active: Target = 0.5,
    taus: Annotated[
        str, typer.Option(help="Thresholds of all layers.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    steps: Annotated[int, typer.Option(min=1, help="Of two windows each.")] = 80,
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """Perplexity and active share as the threshold rises, as in DSMoE's Table 4.

    Of the calibrated model, and of the same after training on the dense model's predictions (KL).
    With matplotlib, paper.png beside the rows shows the curves and every layer's share.
    """
    from .paper import Swept, draw, layers_table, verdicts

    table = Rows(out, "paper")
    for bench in _benches(model, tokens, windows, wikitext, seeds, out):
        table.add_dense(bench, target=target_active)
        for name, training in (("calibrated", 0), ("tuned", steps)):
            swept = Swept(bench, target_active, training)
            for tau in numbers(taus, float, "--taus"):
                what = {"of": name, "tau": tau, "steps": training, "target": target_active}
                losses = functools.partial(swept.losses, tau)
                table.add(bench, f"{name}, tau {tau:g}", losses, **what)
    table.show(f"perplexity / dense @ active share, calibrated for {target_active:g}")
    print("\n" + layers_table(table.rows))
    print("\n".join(["", *verdicts(table.rows)]))
    if find_spec("matplotlib"):
        draw(table.rows, out / "paper.png")
