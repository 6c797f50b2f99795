"""What one tile of every kernel costs, counted while the interpreter runs it; `dsmoe bench
gpu-model` predicts times from this table.

    python python_tests/cuda/count_work.py --write     writes dsmoe_ext/benchmarks/gpu_counts.json

A tile's main loop is run with few and with many steps; the difference is the cost of a step, the
rest that of a tile. Both depend on how many of the tile's 16-row blocks hold rows, and are counted
for two numbers of them. Numbers are per CTA: warp instructions, cycles of shared memory (each moves
128 bytes), bytes that global loads, copies and stores move, in whole sectors. "sass" is the length
of the main loop in machine code, from machine_code.txt: the issue slots that a warp takes per step.
"mma" counts products of 16 x 8 x 16, whichever instruction makes them.
"""

import argparse
import json
import re
import sys

import torch
from interpreted import Interpreter
from machine_code import TABLE as MACHINE_CODE
from machine_code import readable
from nvcc import ROOT
from ptx import Counters

from dsmoe_ext.testing import random_case

TABLE = ROOT / "dsmoe_ext" / "benchmarks" / "gpu_counts.json"
FEW, MANY = 2, 6  # steps
# kernel -> numbers of tokens; (hidden size, expert size) that give so many steps; tiles in the
# launch; steps that the counted number stands for
KERNELS = {
    "gate_up<16>": ((32, 128), lambda steps: (32 * steps, 16), 1, 1),
    "gate_up<32>": ((32, 128), lambda steps: (32 * steps, 32), 1, 1),
    "gate_up<64>": ((32, 128), lambda steps: (32 * steps, 64), 1, 1),
    "down": ((32, 128), lambda steps: (128, 32 * steps), 1, 1),
    # decode: two units of 8 neurons, 512 terms a step; two strips, 8 warps take a step each
    "neurons": ((1, 16), lambda steps: (512 * steps, 16), 2, 1),
    "outputs": ((1, 16), lambda steps: (128, 16 * 8 * steps), 2, 8),
    # backward; the weights' steps are of tokens, their rows neurons
    "neurons<32>": ((32, 128), lambda steps: (32 * steps, 32), 1, 1),
    "neurons<64>": ((32, 96), lambda steps: (32 * steps, 64), 1, 1),
    "neurons<64>, saved": ((32, 128), lambda steps: (32 * steps, 64), 1, 1),
    "neurons<128>, saved": ((32, 128), lambda steps: (32 * steps, 128), 1, 1),
    "weights": ((32, 128), lambda steps: (128, 32 * steps), 1, 1),
    # sm_90a
    "sm90a gate_up<16>": ((64, 256), lambda steps: (64 * steps, 16), 1, 1),
    "sm90a gate_up<32>": ((64, 256), lambda steps: (64 * steps, 32), 1, 1),
    "sm90a gate_up<64>": ((64, 256), lambda steps: (64 * steps, 64), 1, 1),
    "sm90a gate_up<96>": ((64, 256), lambda steps: (64 * steps, 192), 2, 1),
    "sm90a down<64>": ((64, 256), lambda steps: (64, 64 * steps), 1, 1),
    "sm90a down<128>": ((64, 256), lambda steps: (128, 64 * steps), 1, 1),
    "sm90a down<192>": ((64, 256), lambda steps: (192, 64 * steps), 1, 1),
    "sm90a recompute<32>": ((64, 256), lambda steps: (64 * steps, 32), 1, 1),
    "sm90a recompute<64>": ((64, 256), lambda steps: (64 * steps, 64), 1, 1),
    "sm90a recompute<96>": ((64, 256), lambda steps: (64 * steps, 192), 2, 1),
    "sm90a neurons<16>": ((64, 256), lambda steps: (64 * steps, 32), 1, 1),
    "sm90a neurons<64>": ((64, 256), lambda steps: (64 * steps, 128), 1, 1),
    "sm90a neurons<80>": ((64, 256), lambda steps: (64 * steps, 160), 1, 1),
    "sm90a neurons<16>, saved": ((64, 256), lambda steps: (64 * steps, 32), 1, 1),
    "sm90a neurons<64>, saved": ((64, 256), lambda steps: (64 * steps, 128), 1, 1),
    "sm90a neurons<80>, saved": ((64, 256), lambda steps: (64 * steps, 160), 1, 1),
    "sm90a weights": ((64, 256), lambda steps: (192, 64 * steps), 1, 1),
    # fp32: whole tiles, whatever is in them. In down, experts of less than 64 neurons are another
    # kind of sum: so twice the steps
    "fp32 gate_up<64>": ((32, 64), lambda steps: (16 * steps, 64), 1, 1),
    "fp32 down": ((32, 64), lambda steps: (64, 32 * steps), 1, 2),
    "fp32 neurons<64>": ((32, 64), lambda steps: (16 * steps, 64), 1, 1),
    "fp32 neurons<64>, saved": ((32, 64), lambda steps: (16 * steps, 64), 1, 1),
    "fp32 weights": ((32, 64), lambda steps: (64, 16 * steps), 1, 1),
    "tf32 gate_up<16>": ((32, 128), lambda steps: (16 * steps, 16), 1, 1),
    "tf32 gate_up<32>": ((32, 128), lambda steps: (16 * steps, 32), 1, 1),
    "tf32 gate_up<64>": ((32, 128), lambda steps: (16 * steps, 64), 1, 1),
    "tf32 down": ((32, 128), lambda steps: (128, 32 * steps), 1, 2),
    "tf32 neurons<32>": ((32, 128), lambda steps: (16 * steps, 32), 1, 1),
    "tf32 neurons<64>": ((32, 96), lambda steps: (16 * steps, 64), 1, 1),
    "tf32 neurons<64>, saved": ((32, 128), lambda steps: (16 * steps, 64), 1, 1),
    "tf32 neurons<128>, saved": ((32, 128), lambda steps: (16 * steps, 128), 1, 1),
    "tf32 weights": ((32, 128), lambda steps: (128, 16 * steps), 1, 1),
}
# the same kernels where they keep g and u
KERNELS |= {
    f"{name}, saving": how
    for name, how in KERNELS.items()
    if "gate_up" in name and "<96>" not in name
}
LOOPS = {"bfloat16": "", "float": "tf32 "}  # by dtype of the mma.sync kernels
BACKWARD = ("neurons<", "weights", "recompute")


def short(name):
    """gate_up_kernel<bfloat16,GateUpTile<bfloat16,64,2>> -> gate_up<64>; None for the helpers."""
    if tile := re.match(r"gate_up_kernel<(bfloat16|float),GateUpTile<\w+,(\d+)", name):
        return f"{LOOPS[tile[1]]}gate_up<{tile[2]}>"
    if own := re.match(
        r"sm90a::(gate_up|down|recompute|neurons|weights)_kernel<bfloat16(?:,(\d+))?(,true)?", name
    ):
        return f"sm90a {own[1]}" + (f"<{own[2]}>" if own[2] else "") + (", saved" if own[3] else "")
    saved = {"true": ", saved", "false": ""}
    if own := re.match(
        r"neurons_backward_kernel<(bfloat16|float),NeuronsTile<\w+,(\w+),(\d)>", name
    ):
        columns = int(own[3]) * {"true": 64, "false": 32}[own[2]]
        return f"{LOOPS[own[1]]}neurons<{columns}>{saved[own[2]]}"
    if fp32 := re.match(r"(\w+)_ffma_kernel<float(?:,(\w+))?>", name):
        tile = {"gate_up": "gate_up<64>", "neurons": "neurons<64>"}.get(fp32[1], fp32[1])
        return f"fp32 {tile}{saved[fp32[2]] if fp32[2] else ''}"
    plain = re.match(
        r"(down|neurons|outputs|weights)_kernel<(?:Numbers<)?(bfloat16|float)>?"
        r"(,StepOfRows<bfloat16>)?>",
        name,
    )
    return LOOPS[plain[2]] + plain[1] if plain else None


class CountingInterpreter(Interpreter):
    """Keeps the counters of every launch apart."""

    def __init__(self, **options):
        super().__init__(**options)
        self.per_launch = []  # (mangled name, Counters)

    def _launch(self, name, *rest):
        self.device.counters = Counters()
        super()._launch(name, *rest)
        self.per_launch.append((name.decode(), self.device.counters))


def summary(counters):
    """The numbers of the table."""
    moved = {"load_bytes": ("ld", "cp"), "store_bytes": ("st", "red", "atom")}
    return {
        "instructions": sum(counters.instructions.values()),
        "mma": counters.products or counters.instructions["mma"],
        "fma": counters.opcodes["fma"],
        "ldmatrix": counters.instructions["ldmatrix"],
        "barrier": counters.instructions["barrier"],
        "shared_cycles": counters.total(counters.cycles).units,
        **{
            name: 32 * sum(t.units for (_, op), t in counters.sectors.items() if op in ops)
            for name, ops in moved.items()
        },
    }


def run(kernel, steps, rows, experts=1):
    hidden, size = KERNELS[kernel][1](steps)
    plain, saves = kernel.removesuffix(", saving"), ", sav" in kernel
    if "weights" in kernel:
        rows, size = size, rows
    dtype = torch.float32 if "32 " in kernel else torch.bfloat16
    case = random_case(0, rows, hidden, [size] * experts, active=1.0, dtype=dtype)
    arch = "90a" if kernel.startswith("sm90a") else "80"
    ops = CountingInterpreter(multiprocessors=1, arch=arch, parts=1)
    ops.allow_tf32 = kernel.startswith("tf32")
    if any(name in kernel for name in BACKWARD):  # of gate_proj's gradient alone
        others = ("dx", "dgates", "dup_proj", "ddown_proj_t")
        options = dict(dy=case.dy, without=others, save_activations=saves)
        ops.sparse_ffn_backward(*case.inputs(), **options)
    else:
        ops.sparse_ffn(*case.inputs(), save_activations=saves)
    names = readable(sorted({name for name, _ in ops.per_launch}))
    (found,) = [c for name, c in ops.per_launch if short(names[name]) == plain]
    return summary(found)


def sass_loops():
    """{kernel: {arch: instructions of the main loop}} from machine_code.txt."""
    loops, kernel = {}, None
    for line in MACHINE_CODE.read_text().splitlines():
        if ": " in line:
            kernel = short(line.partition(": ")[2])
        elif kernel and line.split() and line.split()[0].isdigit():
            loops.setdefault(kernel, {})[line.split()[0]] = int(line.split()[7])
    return loops


def measure():
    """The table: {kernel: {"sass": {arch: ..}, "rows": {rows: {"step": .., "tile": ..}}}}."""
    table, loops = {}, sass_loops()
    for kernel, (rows_counted, _, tiles, steps) in KERNELS.items():
        rows_table = {}
        for rows in rows_counted:
            few, many = run(kernel, FEW, rows), run(kernel, MANY, rows)
            step = {k: (many[k] - few[k]) / (MANY - FEW) for k in few}
            rows_table[str(rows)] = {
                "step": {k: v / tiles / steps for k, v in step.items()},
                "tile": {k: (few[k] - FEW * step[k]) / tiles for k in few},
            }
            if "sm90a down" in kernel:  # a second expert tells a tile's cost from the unit's
                second = run(kernel, FEW, rows, experts=2)
                tile = {k: second[k] - few[k] - FEW * step[k] for k in few}
                both = rows_table[str(rows)]["tile"]
                rows_table[str(rows)] |= {"tile": tile, "unit": {k: both[k] - tile[k] for k in few}}
        plain = kernel.removesuffix(", saving")
        table[kernel] = {"sass": loops.get(plain, {}), "rows": rows_table}
    return table


def to_text(table):
    """JSON, one line for each set of numbers."""
    lines = []
    for kernel, entry in table.items():
        rows = ",\n".join(
            f'   "{rows}": {{\n    '
            + ",\n    ".join(f'"{part}": {json.dumps(numbers)}' for part, numbers in parts.items())
            + "}"
            for rows, parts in entry["rows"].items()
        )
        sass = json.dumps(entry["sass"])
        lines.append(f' "{kernel}": {{\n  "sass": {sass},\n  "rows": {{\n{rows}}}}}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    text = to_text(measure())
    if parser.parse_args().write:
        TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
