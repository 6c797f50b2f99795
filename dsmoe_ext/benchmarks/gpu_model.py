"""Predicted time of the CUDA kernels (forward, backward, decode) on a named GPU, from counted work.

A kernel's tiles are dealt to the CTAs as its scheduler deals them. A tile costs its steps times the
busiest pipe of an SM (tensor cores, issue slots, shared memory), plus its own instructions; an SM's
time is the sum over its CTAs, or the longest chain of one CTA where too few share the SM. The
kernel's time is the slowest SM, or the traffic of L2 or DRAM if that takes longer, plus a launch.
The counts come from gpu_counts.json; `python python_tests/cuda/count_work.py --write` makes it by
running the kernels in the interpreter.

Schedulers walk past experts, which nothing hides where an SM holds one CTA. `down`'s strips that L2
cannot hold go to DRAM and back with every expert. Not in the model: misses in L2 beyond those
stated, and stalls within a warp that its SM's other warps do not fill. The rates are those of
`gpu_specs.sustained`, of a calibration, or of the datasheet.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dsmoe_ext.benchmarks.gpu_load import DECODE_TOKENS, Load
from dsmoe_ext.benchmarks.gpu_specs import FP32, TF32, WGMMA, Gpu, Loop

COUNTS = Path(__file__).with_name("gpu_counts.json")
CHUNK_TOKENS = 256  # of y, what a CTA of `down` owns at least
GROUP = 1024  # pairs of every expert, or columns of H, that tiles take before the next ones
# rows that a step of an mma.sync kernel multiplies, at least as many as there are: blocks of 16 are
# dealt to two or four warps, of which the busiest decides; weights has loops for so many
BY_64, BY_32 = (64, 128), (32, 64, 96, 128)
MULTIPLIED_ROWS = {"gate_up<16>": BY_64, "gate_up<32>": BY_32, "gate_up<64>": BY_32, "down": BY_32,
                   "neurons<32>": BY_64, "neurons<64>": BY_32,
                   "neurons<64>, saved": BY_64, "neurons<128>, saved": BY_32,
                   "weights": (32, 64, 128)}  # fmt: skip
LATENCY_SECONDS = 0.6e-6  # of DRAM, once per kernel
CALLS = 10  # in a row, when a GPU is measured
HELPER_LAUNCHES = 5  # place_columns, count, scan, write, clear_inactive
WALK_CYCLES = 80  # of a scheduler, from one expert to the next: loads that hit L1


@dataclass(frozen=True)
class Prediction:
    """Seconds of one kernel: what every resource would take alone, and what the model says."""

    kernel: str
    tiles: int
    waves: float
    parts: dict[str, float]
    seconds: float

    @property
    def bound(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)


@cache
def counts() -> dict[str, Any]:
    """What count_work.py wrote."""
    return json.loads(COUNTS.read_text())


@cache
def counted(kernel: str, rows: float, part: str, what: str) -> float:
    """A count of one tile or step with so many rows, on the line through the two counted ones."""
    (a, low), (b, high) = sorted(
        (int(r), v[part][what]) for r, v in counts()[kernel]["rows"].items()
    )
    return low + (high - low) * (rows - a) / (b - a)


@cache
def pipes(gpu: Gpu, kernel: str, rows: int) -> dict[str, float]:
    """Cycles of an SM for one step of one CTA; its warps sit on the SM's four quarters."""
    if gpu.loop.prefix in (WGMMA.prefix, FP32.prefix):
        whole = gpu.loop.blocks(rows)
        op, cycles = {
            WGMMA.prefix: ("mma", gpu.wgmma_cycles),
            FP32.prefix: ("fma", gpu.fma_cycles),
        }[gpu.loop.prefix]
        return {
            gpu.loop.unit: counted(kernel, whole, "step", op) / 4 * cycles,
            "issue": counted(kernel, whole, "step", "instructions") / 4,
            "shared memory": counted(kernel, whole, "step", "shared_cycles"),
        }
    possible = MULTIPLIED_ROWS[kernel.removeprefix(TF32.prefix).removesuffix(", saving")]
    busiest = next(most for most in possible if rows <= most)
    full_tile = max(map(int, counts()[kernel]["rows"]))
    moved = busiest if kernel.endswith("weights") else math.ceil(rows / 16) * 16
    executed = (counted(kernel, r, "step", "instructions") for r in (busiest, full_tile))
    return {
        "tensor cores": counted(kernel, busiest, "step", "mma") / 4 * gpu.mma_cycles,
        "issue": counts()[kernel]["sass"][gpu.arch] * next(executed) / next(executed),
        "shared memory": counted(kernel, moved, "step", "shared_cycles"),
    }


def aside(gpu: Gpu, kernel: str, rows: int, part: str) -> tuple[float, float, float]:
    """What a tile or unit costs beside its steps: cycles, issue slots, bytes. Blocks are multiplied
    whole, but rows beyond the last one are not moved.

    Where an SM holds one CTA, nobody multiplies while its results travel, at the SM's share of L2.
    """
    slots = counted(kernel, gpu.loop.blocks(rows), part, "instructions") / 4
    moved = sum(counted(kernel, rows, part, k) for k in ("load_bytes", "store_bytes"))
    alone = gpu.loop.ctas_per_sm == 1
    travel = moved * gpu.sms / gpu.l2_bytes_per_cycle if alone else 0.0
    return max(slots, travel), slots, moved


def run_tiles(
    gpu: Gpu,
    kernel: str,
    ctas: list[list[tuple[int, int]]],
    dram: float,
    units: list[list[int]] | None = None,
    walked: int = 0,
) -> Prediction:
    """ctas: for every CTA its tiles as (rows, steps); units: the tokens of its units, where those
    were counted apart from tiles; walked: experts that a CTA's scheduler passes in all."""
    sums = dict.fromkeys((gpu.loop.unit, "issue", "shared memory"), 0.0)
    busy, longest, moved = [0.0] * gpu.sms, [0.0] * gpu.sms, 0.0
    for index, tiles in enumerate(ctas):
        sm, chain = index % gpu.sms, walked * float(WALK_CYCLES)
        if gpu.loop.ctas_per_sm == 1:
            busy[sm] += chain
        for rows, steps in tiles:
            step = pipes(gpu, kernel, rows)
            own, slots, own_bytes = aside(gpu, kernel, rows, "tile")
            busy[sm] += steps * max(step.values()) + own
            chain += steps * (step[gpu.loop.unit] + gpu.loop.sync_cycles) + own
            for name, cycles in step.items():
                sums[name] += steps * cycles + (slots if name == "issue" else 0.0)
            moved += own_bytes
            for what in ("load_bytes", "store_bytes"):
                moved += steps * counted(kernel, rows, "step", what)
        for tokens in units[index] if units else ():
            own, slots, own_bytes = aside(gpu, kernel, tokens, "unit")
            busy[sm], chain, moved = busy[sm] + own, chain + own, moved + own_bytes
            sums["issue"] += slots
        longest[sm] = max(longest[sm], chain)
    sm_seconds = max(map(max, zip(busy, longest, strict=True)), default=0.0) / gpu.hertz
    parts = {name: cycles / gpu.sms / gpu.hertz for name, cycles in sums.items()}
    parts |= {"L2": moved / gpu.l2_bandwidth, "DRAM": dram / gpu.bandwidth}
    seconds = max(sm_seconds, parts["L2"], parts["DRAM"])
    num_tiles = sum(map(len, ctas))
    fixed = gpu.launch_seconds + (LATENCY_SECONDS if num_tiles else 0.0)
    return Prediction(kernel, num_tiles, num_tiles / max(len(ctas), 1), parts, seconds + fixed)


def deal(gpu: Gpu, tiles: list[Any]) -> list[list[Any]]:
    """Tile i goes to CTA i modulo their number, as in TileScheduler."""
    ctas = gpu.loop.ctas_per_sm * gpu.sms
    return [tiles[i::ctas] for i in range(ctas)]


def deal_evenly(gpu: Gpu, tiles: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """As EvenTiles of sm_90a: of tiles that make no whole round, and are at most one for two CTAs,
    either takes half of the rows."""
    ctas, half = gpu.loop.ctas_per_sm * gpu.sms, gpu.loop.tile_rows // 2
    odd = len(tiles) % ctas
    if gpu.loop is not WGMMA or 2 * odd > ctas:
        return deal(gpu, tiles)
    dealt = deal(gpu, tiles[odd:])
    for i, (rows, steps) in enumerate(tiles[:odd]):
        dealt[2 * i].append((min(rows, half), steps))
        if rows > half:
            dealt[2 * i + 1].append((rows - half, steps))
    return dealt


def gathered(
    gpu: Gpu,
    load: Load,
    kernels: list[tuple[str, int, int, int]],
    matrices: int,
    products: int,
    kept: int,
) -> list[Prediction]:
    """Rows gathered from `matrices` [T,H] times rows of `products` weight matrices, over H: a
    launch for each kernel (name, rows and columns of a tile, up to which size of expert). kept:
    numbers that are read or written of a pair's neuron."""
    out, loop, smallest, hidden = [], gpu.loop, 1, load.hidden_size
    steps = math.ceil(hidden / loop.step_terms)
    for kernel, tile_rows, columns, largest in kernels:
        group = GROUP // tile_rows
        tiles, moved, active = [], 0.0, 0
        experts = []  # size, rows of its tiles
        for size, pairs in zip(load.sizes, load.active.sum(0).tolist(), strict=True):
            if not smallest <= size <= largest or not pairs:
                continue
            rows = [min(tile_rows, pairs - i) for i in range(0, pairs, tile_rows)]
            experts.append((size, rows))
            groups = math.ceil(len(rows) / group)  # each reads the weights again
            moved += groups * products * size * hidden + pairs * kept * size
            active += pairs
        for first in range(0, max((len(rows) for _, rows in experts), default=0), group):
            for size, rows in experts:
                mine = [(r, steps) for r in rows[first : first + group]]
                tiles += mine * math.ceil(size / columns)
        if active:  # the tokens that a group of all experts' pairs is of
            tokens = min(load.num_tokens, GROUP * load.num_tokens * len(experts) / active)
            read = rows_read(gpu, load, tokens * hidden * matrices, active)
            moved += matrices * hidden * read
        rounds = math.ceil(max((len(rows) for _, rows in experts), default=0) / group) + 1
        walked = rounds * len(load.sizes)
        dealt = deal_evenly(gpu, tiles)
        out.append(run_tiles(gpu, kernel, dealt, load.number_bytes * moved, walked=walked))
        smallest = largest + 1
    return out


def rows_read(gpu: Gpu, load: Load, held: float, pairs: int) -> int:
    """Of a [T,H] matrix, from DRAM: each row once, if L2 can hold so many numbers until all experts
    have passed, else by every pair."""
    return min(load.num_tokens, pairs) if held * load.number_bytes <= gpu.l2_bytes else pairs


def gate_up(gpu: Gpu, load: Load) -> list[Prediction]:
    """One launch for each width of tile; experts choose by their size."""
    loop, saving = gpu.loop, ", saving" if load.is_saved else ""
    widths = loop.saving_widths if saving else loop.widths
    kernels = [
        (f"{loop.prefix}gate_up<{c}>{saving}", loop.tile_rows, c, most) for c, most in widths
    ]
    written = 3 if saving else 1
    return gathered(gpu, load, kernels, matrices=1, products=2, kept=written)


def strip(gpu: Gpu, load: Load) -> tuple[int, int]:
    """Columns and tokens of a unit of `down`, chosen as in sm90a/forward.cu."""

    def cost(choice: tuple[int, int]) -> int:
        columns, tokens = choice
        units = math.ceil(load.num_tokens / tokens) * math.ceil(load.hidden_size / columns)
        return math.ceil(units / gpu.sms) * (tokens * 3 // 8 + columns)

    return min(gpu.loop.strips, key=cost)


def down(gpu: Gpu, load: Load, sources: int = 1, ends: bool = True) -> Prediction:
    """A unit is some tokens by a strip; small experts that are neighbours go as one, dense.
    Several sources make one sum of several times the steps. ends: units are cleared and written."""
    loop, number = gpu.loop, load.number_bytes
    columns, unit_tokens = strip(gpu, load)
    strips = math.ceil(load.hidden_size / columns)
    units, tokens, read = [], [], 0.0
    for first in range(0, load.num_tokens, unit_tokens):
        chunk = load.active[first : first + unit_tokens]
        tiles, run = [], 0
        for size, pairs in zip((*load.sizes, 0), (*chunk.sum(0).tolist(), -1), strict=True):
            small = 0 < size < 64
            run += math.ceil(size / 16) * 16 if small else 0
            if not small and run:  # the run of small experts ends here
                tiles += row_tiles_of(loop, len(chunk), run, sources)
                run = 0
            if not small and pairs > 0:
                tiles += row_tiles_of(loop, pairs, size, sources)
            read += number * size * max(pairs, 0)
        units += [tiles] * strips
        tokens += [len(chunk)] * strips
    ctas = [[t for unit in mine for t in unit] for mine in deal(gpu, units)]
    waves = math.ceil(len(units) / (loop.ctas_per_sm * gpu.sms))
    dram = sources * (read + waves * number * load.hidden_size * sum(load.sizes))
    dram += number * load.num_tokens * load.hidden_size
    if loop is not FP32 and load.dtype == "bf16":
        dram += strips_missing(gpu, ctas, columns, unit_tokens)
    apart = deal(gpu, tokens) if loop is WGMMA and ends else None
    kernel = f"{loop.prefix}down" + (f"<{columns}>" if loop is WGMMA else "")
    walked = len(load.sizes) * max(map(len, deal(gpu, units)), default=0)
    return run_tiles(gpu, kernel, ctas, dram, apart, walked=walked)


def strips_missing(gpu: Gpu, ctas: list[Any], columns: int, unit_tokens: int) -> float:
    """Bytes of fp32 sums that DRAM moves, since the strips that all CTAs are at are more than L2
    holds: read and written with every tile, in the share that does not fit."""
    held = sum(map(bool, ctas)) * columns * unit_tokens * 4.0
    missing = max(0.0, 1.0 - gpu.l2_bytes / held) if held else 0.0
    rows = sum(rows for tiles in ctas for rows, _ in tiles)
    return missing * 2 * 4.0 * rows * columns


def row_tiles_of(loop: Loop, rows: int, terms: int, sources: int) -> list[tuple[int, int]]:
    steps = sources * math.ceil(terms / loop.step_terms)
    return [(min(loop.tile_rows, rows - r), steps) for r in range(0, rows, loop.tile_rows)]


def decode(gpu: Gpu, load: Load) -> list[Prediction]:
    """T <= 16: two kernels that stream the weights of the experts in use."""
    used = (load.active.any(0) * torch.tensor(load.sizes)).tolist()
    units = sum(math.ceil(size / 8) for size in used)
    out = []
    for kernel, tiles, steps, share in (
        ("neurons", units, load.hidden_size / 512, 2 / 3),
        ("outputs", math.ceil(load.hidden_size / 64), units / 2, 1 / 3),
    ):
        per_step = {k: counted(kernel, load.num_tokens, "step", k) for k in
                    ("instructions", "mma", "load_bytes")}  # fmt: skip
        total = {k: v * tiles * steps for k, v in per_step.items()}
        issued = total["instructions"] + tiles * counted(
            kernel, load.num_tokens, "tile", "instructions"
        )
        cycles = gpu.sms * 4 * gpu.hertz
        parts = {
            "tensor cores": total["mma"] * gpu.mma_cycles / cycles,
            "issue": issued / cycles,
            "L2": total["load_bytes"] / gpu.l2_bandwidth,
            "DRAM": share * load.weight_bytes() / gpu.bandwidth,
        }
        seconds = max(parts.values()) + gpu.launch_seconds + LATENCY_SECONDS
        out.append(Prediction(kernel, tiles, 1.0, parts, seconds))
    return out


def helpers(gpu: Gpu, load: Load, launches: int) -> Prediction:
    """The small kernels around the products; gates are read by count, by write, by
    clear_inactive."""
    moved = 3 * 4.0 * load.active.numel() / gpu.bandwidth
    seconds = launches * (gpu.launch_seconds + LATENCY_SECONDS) + moved
    return Prediction("permute", 0, 0.0, {"DRAM": moved}, seconds)


def predict(gpu: Gpu, load: Load) -> list[Prediction]:
    """Every kernel of one forward or backward, in order."""
    gpu = gpu.for_dtype(load.dtype)
    if load.is_backward:
        from dsmoe_ext.benchmarks.gpu_backward import backward

        return backward(gpu, load)
    if load.num_tokens <= DECODE_TOKENS and load.dtype == "bf16" and not load.is_saved:
        return decode(gpu, load)
    return [helpers(gpu, load, HELPER_LAUNCHES), *gate_up(gpu, load), down(gpu, load)]


def measure(load: Load) -> float:
    """Seconds of the forward on the GPU of this machine, which does not wait for Python between
    CALLS calls; the fastest of 20 such rows."""
    from dsmoe_ext import ops
    from dsmoe_ext.testing import random_case

    dtype = torch.bfloat16 if load.dtype == "bf16" else torch.float32
    sizes = list(load.sizes)
    case = random_case(0, load.num_tokens, load.hidden_size, sizes, active=1.0, dtype=dtype)
    case.gates *= load.active
    inputs = [t.cuda() for t in case.inputs()]
    torch.backends.cuda.matmul.allow_tf32 = load.dtype == "tf32"
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(CALLS):
            ops.sparse_ffn(*inputs)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return min(times)
