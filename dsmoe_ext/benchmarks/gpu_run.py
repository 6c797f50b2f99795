"""The parts of `dsmoe bench gpu` in order, what it prints and the JSON that it writes."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dsmoe_ext.benchmarks import gpu
from dsmoe_ext.benchmarks.gpu_cases import FINE, LLAMA_7B, RAGGED, TINY, check_layer
from dsmoe_ext.command_line.console import out as console

PARTS = ("check", "ceilings", "time", "kernels")
# one token, decode's most and one more, one pass, several passes over tokens, many experts
CHECKED = [(RAGGED, 300), *((LLAMA_7B, t) for t in (1, 16, 17, 512, 2048, 8192, 12288)),
           (FINE, 2048)]  # fmt: skip


def run(parts: list[str], device: str, small: bool, path: Path | None) -> dict[str, Any]:
    """Prints as it goes, and writes the file after every part, so that what a crash follows is
    kept. Raises AssertionError where a result is wrong."""
    found: dict[str, Any] = {"device": gpu.device() if device != "cpu" else {"name": "cpu"}}
    console.print(f"{found['device']}", highlight=False)

    def keep(part: str, content: Any) -> None:
        found[part] = content
        if path:
            path.write_text(json.dumps(found, indent=1) + "\n")

    if "check" in parts:
        keep("check", _check(device, [(TINY, 50)] if small else CHECKED))
    if "ceilings" in parts:
        keep("ceilings", gpu.ceilings())
        console.print({name: f"{value:.3g}" for name, value in found["ceilings"].items()})
    if "time" in parts:
        rows: list[Any] = []
        for row in gpu.times():
            keep("time", rows := [*rows, row])
            console.print(_one_line(row), highlight=False)
    if "kernels" in parts:
        keep("kernels", {})
        for name, kernels in gpu.profiles():
            keep("kernels", found["kernels"] | {name: kernels})
            console.print(_kernel_table(name, kernels))
    return found


def _check(device: str, cases: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for layer, tokens in cases:
        for save in (True, False):
            errors = check_layer(layer, tokens, save, device)
            rows.append({"layer": layer.name, "tokens": tokens, "saved": save, "errors": errors})
            worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-9))
            ours, theirs = errors[worst]
            console.print(
                f"right: {layer.name}, T {tokens}{', saved' * save}; furthest from PyTorch in "
                f"{worst}, {ours:.1e} to its {theirs:.1e}",
                highlight=False,
            )
    return rows


def _one_line(row: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} {1e6 * s:.1f}" for name, s in row["seconds"].items())
    return (
        f"{row['layer']}, T {row['tokens']}: us {shown}; "
        f"{row['forward_flops_per_second'] / 1e12:.0f} TFLOP/s, "
        f"weights {row['weight_bytes_per_second'] / 1e12:.2f} TB/s"
    )


def _kernel_table(name: str, kernels: dict[str, Any]) -> Table:
    table = Table(title=name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("us", "launches", "kernel"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel, (seconds, launches) in kernels.items():
        table.add_row(f"{1e6 * seconds:.1f}", f"{launches:g}", kernel)
    return table
