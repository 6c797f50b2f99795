"""The backward in the model of GPU time (gpu_model.py): all outputs, in passes over the neurons."""

import math
from dataclasses import replace
from itertools import accumulate

from dsmoe_ext.benchmarks.gpu_load import Load
from dsmoe_ext.benchmarks.gpu_model import (
    CHUNK_TOKENS,
    GROUP,
    Prediction,
    deal,
    down,
    gathered,
    helpers,
    rows_read,
    run_tiles,
)
from dsmoe_ext.benchmarks.gpu_specs import ANY, FP32, WGMMA, Gpu

# of sm_90a: columns of a tile, up to which size of expert
RECOMPUTE, NEURONS = ((32, 32), (64, 128), (96, ANY)), ((32, 32), (128, 128), (160, ANY))


def per_pass(count: int, unit: int, most: int) -> int:
    """How many of `count` (1 or more) a pass takes, of passes that are alike."""
    units = math.ceil(count / unit)
    return math.ceil(units / math.ceil(units / max(most // unit, 1))) * unit


def cut(load: Load) -> tuple[int, int, int]:
    """Tokens of a pass, its columns at most, and passes over the columns, as layout() in
    expert_mlp_bwd.cu cuts 256 MiB without knowing the experts' sizes."""
    experts, neurons, number = len(load.sizes), sum(load.sizes), int(load.number_bytes)
    columns = (neurons + 15 * min(experts, neurons)) // 16 * 16  # every expert rounded up
    sums = math.ceil(load.hidden_size / 128) * 128 * 4 if load.dtype == "bf16" else 0
    room = (256 << 20) - 4 * columns - 64 * experts - 8192
    least = min(columns, 256) * (3 * number + 1)
    chunk = CHUNK_TOKENS * (sums + 5 * experts)
    most = min(room * 5 // 8 // chunk * CHUNK_TOKENS, room * 3 // 8 // least)
    tokens = per_pass(load.num_tokens, CHUNK_TOKENS, most)
    width = (room - tokens // CHUNK_TOKENS * chunk) // (tokens * 3 * number + tokens // 4)
    if sums and load.num_tokens > tokens:  # or sums of weight gradients
        width = min(width, tokens * sums // (3 * 4 * load.hidden_size))
    width = per_pass(columns, 64, width)
    return tokens, width, math.ceil(columns / width)


def passes(load: Load) -> list[list[Load]]:
    """Of every pass over the tokens, the experts as each pass over the columns sees them."""
    tokens, most, count = cut(load)
    ends = list(accumulate(math.ceil(size / 16) * 16 for size in load.sizes))
    width = per_pass(ends[-1], 64, most)
    out = []
    for first in range(0, count * width, width):
        clipped = [
            max(0, min(size, first + width - begin) - max(0, first - begin))
            for size, begin in zip(load.sizes, (0, *ends), strict=False)
        ]
        there = [i for i, size in enumerate(clipped) if size]
        sizes = tuple(clipped[i] for i in there)
        out.append(replace(load, sizes=sizes, active=load.active[:, there]))
    return [
        [replace(part, active=part.active[first : first + tokens]) for part in out]
        for first in range(0, load.num_tokens, tokens)
    ]


def neurons(gpu: Gpu, load: Load) -> list[Prediction]:
    """What every gradient is made of: g, u and da in one kernel, or da alone where g and u were
    saved; on sm_90a recomputed g and u wait in the workspace for da."""
    loop = gpu.loop
    saved = ", saved" if load.is_saved else ""
    if loop is not WGMMA:
        tiles = (loop.saved_neurons if load.is_saved else loop.neurons) or ()
        kernels = [
            (f"{loop.prefix}neurons<{columns}>{saved}", rows, columns, most)
            for rows, columns, most in tiles
        ]
        if load.is_saved:
            return gathered(gpu, load, kernels, matrices=1, products=1, kept=5)
        return gathered(gpu, load, kernels, matrices=2, products=3, kept=3)
    rows = loop.tile_rows
    recompute = [(f"sm90a recompute<{c}>", rows, c, most) for c, most in RECOMPUTE]
    rest = [(f"sm90a neurons<{c // 2}>{saved}", rows, c, most) for c, most in NEURONS]
    made = gathered(gpu, load, rest, matrices=1, products=1, kept=5)
    if load.is_saved:
        return made
    return gathered(gpu, load, recompute, matrices=1, products=2, kept=2) + made


def dx(gpu: Gpu, load: Load, ends: bool) -> Prediction:
    """The forward's kernel, with two sources: one after the other in fp32. ends: strips are cleared
    or y is written."""
    if gpu.loop is not FP32:
        return down(gpu, load, sources=2, ends=ends)
    one = down(gpu, load)
    both = {k: 2 * v for k, v in one.parts.items()}
    return replace(one, tiles=2 * one.tiles, parts=both, seconds=2 * one.seconds)


def weights(gpu: Gpu, load: Load) -> list[Prediction]:
    """Three gradients, whose tiles have neurons as rows and tokens as steps: three launches, but
    one on sm_90a."""
    loop, hidden, launches = gpu.loop, load.hidden_size, 1 if gpu.loop is WGMMA else 3
    tile_rows, columns = loop.weights
    group, column_tiles = GROUP // columns, math.ceil(hidden / columns)
    tiles, moved, active = [], 0.0, 0
    experts = list(zip(load.sizes, load.active.sum(0).tolist(), strict=True))
    for begin in range(0, column_tiles, group):
        for size, pairs in experts:
            steps = math.ceil(pairs / loop.step_terms)
            for first in range(0, size, tile_rows):
                rows = min(size - first, tile_rows)
                tiles += [(rows, steps)] * min(group, column_tiles - begin)
            moved += pairs * size
    for size, pairs in experts:
        moved += size * hidden
        active += pairs
    moved += hidden * rows_read(gpu, load, load.num_tokens * group * columns, active)
    each = 3 // launches
    ctas = deal(gpu, tiles * each)
    moved *= each * load.number_bytes
    return [run_tiles(gpu, f"{loop.prefix}weights", ctas, moved)] * launches


def backward(gpu: Gpu, load: Load) -> list[Prediction]:
    """Every kernel: what it takes in all passes. Tokens that need several passes go through the
    neurons for dx, in half types, and once more for the weight gradients."""
    all_passes, launched = passes(load), []
    in_parts = load.dtype == "bf16" and len(all_passes) > 1
    for over_columns in all_passes:
        for i, part in enumerate(over_columns):
            made = neurons(gpu, part) * (2 if in_parts else 1)
            # clip_experts, place_columns, sum_dgates, clear_inactive twice; lists once
            small = helpers(gpu, part, launches=5 + 3 * (i == 0))
            launched += [*made, dx(gpu, part, ends=i == 0), *weights(gpu, part), small]
    same: dict[str, list[Prediction]] = {}
    for prediction in launched:
        same.setdefault(prediction.kernel, []).append(prediction)
    return [
        Prediction(
            kernel,
            sum(p.tiles for p in every),
            sum(p.waves for p in every),
            {name: sum(p.parts[name] for p in every) for name in every[0].parts},
            sum(p.seconds for p in every),
        )
        for kernel, every in same.items()
    ]
