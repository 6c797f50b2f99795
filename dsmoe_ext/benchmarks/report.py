"""Tables, a JSON file and a plot of measured rows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dsmoe_ext.benchmarks.ffn import Row
from dsmoe_ext.benchmarks.machine import Machine
from dsmoe_ext.benchmarks.model import ModelRow
from dsmoe_ext.benchmarks.replay import Call
from dsmoe_ext.benchmarks.timing import Timing
from dsmoe_ext.errors import UserError
from dsmoe_ext.files import atomic_file, json_text

COLUMNS = ("T", "active", "method", "ms", "median", "90 %", "TFLOP/s", "GB/s", "roof", "/dense")
COLORS = {
    "dense": "#8a94a3",
    "loop": "#c58b2a",
    "transformers": "#b5651d",
    "vllm": "#7a9a3a",
    "sglang": "#9a6fb0",
    "plain": "#6aa2d8",
    "packed": "#2f6fb7",
    "ours": "#2f6fb7",
}


def table(title: str, rows: list[Row]) -> Table:
    """One line a method: time, spread, rates, share of the roofline, ratio to dense torch."""
    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in COLUMNS:
        out.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    dense = {}
    for row in rows:
        best = row.timing.best
        if row.method == "dense":
            dense[row.shape] = best
        out.add_row(
            str(row.shape.num_tokens),
            f"{row.shape.active:.3g}",
            row.method,
            *(f"{1e3 * s:.3f}" for s in (best, row.timing.median, row.timing.slow)),
            f"{row.flops / best / 1e12:.3f}",
            f"{row.read / best / 1e9:.1f}",
            f"{row.roofline / best:.0%}",
            f"{best / dense[row.shape]:.2f}",
            end_section=row is rows[-1] or rows[rows.index(row) + 1].shape != row.shape,
        )
    return out


def replay_table(rows: list[tuple[Call, Timing]]) -> Table:
    """One line a distinct call: how often it was made, its time there and here."""
    out = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in ("op", "calls", "T", "active", "ms there", "ms here", "90 %"):
        out.add_column(column, justify="left" if column == "op" else "right", no_wrap=True)
    for call, timing in rows:
        out.add_row(
            call.op,
            str(call.count),
            str(call.num_tokens),
            "" if call.active is None else f"{call.active:.3f}",
            f"{call.recorded_ms:.3f}",
            *(f"{1e3 * seconds:.3f}" for seconds in (timing.median, timing.slow)),
        )
    return out


def model_table(title: str, rows: list[ModelRow]) -> Table:
    """Tokens a second of dense and sparse, best and median, and the ratio of the best."""
    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in ("task", "dense tok/s", "sparse tok/s", "speed-up", "of medians", "FFN active"):
        out.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for row in rows:
        out.add_row(
            row.task,
            *(f"{row.num_tokens / t.best:.1f}" for t in (row.dense, row.sparse)),
            f"{row.dense.best / row.sparse.best:.2f} x",
            f"{row.dense.median / row.sparse.median:.2f} x",
            f"{row.active:.1%}",
        )
    return out


def prepare_folder(folder: Path | None, *names: str) -> None:
    """Before the timing: the folder of --out is there, and the files `names` in it are ours."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / name for name in names):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.keys() != {"machine", "rows"}:
            raise UserError(f"{path} is no benchmark's; choose another folder with --out")


def save_json(path: Path, machine: Machine, records: list[dict[str, Any]]) -> None:
    """Everything measured, for later comparison."""
    content = {"machine": asdict(machine), "rows": records}
    with atomic_file(path) as partial:
        partial.write_text(json_text(content, indent=1) + "\n")


def save_plot(path: Path, machine: Machine, rows: list[Row]) -> None:
    """Time against active fraction with the ideal line, and rates under the roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    most = max(row.shape.num_tokens for row in rows)
    for name in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == name]
        points = sorted(
            (r.shape.active, 1e3 * r.timing.best) for r in mine if r.shape.num_tokens == most
        )
        left.plot(*zip(*points, strict=True), "o-", label=name, color=COLORS[name], markersize=4)
        right.loglog(
            [row.flops / row.read for row in mine],
            [row.flops / row.timing.best / 1e9 for row in mine],
            "o", label=name, color=COLORS[name], markersize=4,
        )  # fmt: skip
    whole = [
        1e3 * r.timing.best for r in rows if r.shape.num_tokens == most and r.method == "dense"
    ]
    left.plot([0, 1], [0, min(whole)], ":", color="black", label="dense time x active")
    left.set(xlabel="active fraction", ylabel=f"ms, {most} tokens", xlim=(0, 1.05), ylim=(0, None))
    intensities = sorted(row.flops / row.read for row in rows)
    grid = [intensities[0] * (intensities[-1] / intensities[0]) ** (i / 50) for i in range(51)]
    dtype = rows[0].shape.dtype
    limit = [i / machine.roofline(i, 1.0, dtype) / 1e9 for i in grid]
    right.loglog(grid, limit, "-", color="black", label="roofline")
    right.set(xlabel="operations per byte of weights", ylabel="GFLOP/s")
    left.legend(frameon=False)
    right.legend(frameon=False)
    figure.suptitle(f"{machine.processor}, {machine.threads} thread(s), {machine.isa}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
