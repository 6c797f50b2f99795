"""The commands of `dsmoe experiment`."""

from pathlib import Path
from typing import Annotated

import typer

from ..command_line import console
from ..command_line.options import numbers
from .record import Record, markdown

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure the method itself: one command per table of docs/experiments.md. Every row is "
    "written to OUT at once; the same command goes on where it was stopped.",
)

Model = Annotated[str, typer.Option(help="The dense model.")]
Tokens = Annotated[int, typer.Option(min=64, help="Of the model's own text, to calibrate on.")]
Windows = Annotated[int, typer.Option(min=0, help="Windows to measure on, of each text; 0: all.")]
WikiText = Annotated[
    Path | None, typer.Option("--wikitext", help="The raw test file of WikiText-2.")
]
Seeds = Annotated[str, typer.Option(help="Seeds of text and grouping, separated by commas.")]
Out = Annotated[Path, typer.Option("--out", help="The folder of the results.")]


def _benches(model: str, tokens: int, windows: int, wikitext: Path | None, seeds: str):
    from .bench import Bench

    for seed in numbers(seeds, int, "--seeds"):
        yield Bench(model, tokens, 512, windows, wikitext, seed)


def _show(title: str, rows: list[dict], names: list[str]) -> None:
    """Prints the table: ratios to the dense row of the same seed, and active shares."""
    from .bench import ratio

    dense = {row["what"]["seed"]: row for row in rows if row["what"]["row"] == "dense"}
    texts = list(next(iter(dense.values()))["loss"])
    cells = []
    for name in names:
        same = [row for row in rows if row["what"]["row"] == name]
        cell = [name]
        for text in texts:
            ratios = [ratio(row, dense[row["what"]["seed"]], text) for row in same]
            active = sum(row["active"][text] for row in same) / len(same)
            spread = f" ± {(max(ratios) - min(ratios)) / 2:.3f}" if len(same) > 1 else ""
            cell.append(f"{sum(ratios) / len(ratios):.3f}{spread} @{active:.3f}")
        cells.append(cell)
    console.say(title)
    print(markdown(["", *texts], cells))


@app.command()
def ladder(
    model: Model = "smollm2",
    target_active: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.5,
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """What each step costs: oracle neurons, oracle experts, router, refit."""
    from ..models.adopt import gated_mlps, text_model
    from .oracle import masked_ffns, strongest_experts, strongest_neurons

    record = Record(out / "ladder.jsonl")
    rows = []
    for bench in _benches(model, tokens, windows, wikitext, seeds):

        def measured(name: str, measurement, bench=bench) -> None:
            rows.append(record.measure(bench.what(row=name, target=target_active), measurement))

        def oracle(masks, bench=bench) -> dict:
            with masked_ffns(bench.dense, masks):
                losses = bench.losses(bench.dense)
            return losses | {"active": dict.fromkeys(losses["active"], target_active)}

        def oracle_experts(bench=bench) -> dict:
            sparse, _ = bench.calibrate(target_active, refit=False)
            return oracle(strongest_experts(sparse, target_active))

        def calibrated(refit: bool, bench=bench) -> dict:
            sparse, seconds = bench.calibrate(target_active, refit=refit)
            return bench.losses(sparse) | {"seconds": seconds}

        layers = len(gated_mlps(text_model(bench.dense)))
        measured("dense", lambda b=bench: b.losses(b.dense))
        neurons = [strongest_neurons(target_active)] * layers
        measured("oracle neurons", lambda masks=neurons: oracle(masks))
        measured("oracle experts", oracle_experts)
        measured("router", lambda: calibrated(False))
        measured("router, refit", lambda: calibrated(True))
    names = ["dense", "oracle neurons", "oracle experts", "router", "router, refit"]
    _show(f"perplexity / dense @ active share, target {target_active:g}", rows, names)


@app.command()
def static(
    model: Model = "smollm2",
    target_active: Annotated[float, typer.Option(min=0.01, max=1.0)] = 0.5,
    shared: Annotated[str, typer.Option(help="Shares that are always on.")] = "0,0.125,0.25,0.375",
    tokens: Tokens = 65536,
    windows: Windows = 8,
    wikitext: WikiText = None,
    seeds: Seeds = "0",
    out: Out = Path("experiments"),
) -> None:
    """Does routing earn its keep? Against the strongest neurons alone, refitted the same way."""
    record = Record(out / "static.jsonl")
    rows, names = [], ["dense"]
    shares = [*numbers(shared, float, "--shared"), target_active]
    for bench in _benches(model, tokens, windows, wikitext, seeds):
        what = bench.what(row="dense", target=target_active)
        rows.append(record.measure(what, lambda b=bench: b.losses(b.dense)))
        for share in shares:
            name = f"shared {share:g}" if share < target_active else "static: strongest + refit"
            names += [name] if name not in names else []
            rows.append(_calibrated_row(record, bench, name, target_active, share))
    _show(f"perplexity / dense @ active share, target {target_active:g}", rows, names)


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
    record = Record(out / "curve.jsonl")
    rows, names = [], ["dense"]
    for bench in _benches(model, tokens, windows, wikitext, seeds):
        what = bench.what(row="dense")
        rows.append(record.measure(what, lambda b=bench: b.losses(b.dense)))
        for target in numbers(targets, float, "--targets"):
            for kind, share in (("routed", target / 2), ("static", target)):
                name = f"{kind} {target:g}"
                names += [name] if name not in names else []
                rows.append(_calibrated_row(record, bench, name, target, share))
    _show("perplexity / dense @ active share", rows, names)


def _calibrated_row(record: Record, bench, name: str, target: float, shared: float) -> dict:
    def measurement() -> dict:
        sparse, seconds = bench.calibrate(target, shared=shared)
        return bench.losses(sparse) | {"seconds": seconds}

    return record.measure(bench.what(row=name, target=target, shared=shared), measurement)
