"""The backward in the model of GPU time (gpu_model.py): all outputs, in passes over the neurons."""

import math
from dataclasses import replace

from dsmoe_ext.benchmarks.gpu_load import Load
from dsmoe_ext.benchmarks.gpu_model import (
    CHUNK_TOKENS,
    Prediction,
    deal,
    down,
    gathered,
    run_tiles,
)
from dsmoe_ext.benchmarks.gpu_specs import ANY, MMA, WGMMA, Gpu

# of sm_90a: columns of a tile, up to which size of expert
RECOMPUTE, NEURONS = ((32, 32), (64, 128), (96, ANY)), ((32, 32), (128, 128), (160, ANY))


def rows_of_a_pass(load: Load) -> int:
    """Neurons that one pass takes, as layout() in expert_mlp_bwd.cu cuts 256 MiB; all tokens are
    taken to fit in one pass (9984 at H 4096)."""
    experts, number = len(load.sizes), int(load.number_bytes)
    chunks = math.ceil(load.num_tokens / CHUNK_TOKENS)
    sums = math.ceil(load.hidden_size / 128) * 128 * 4 if load.dtype == "bf16" else 0
    room = (256 << 20) - 64 * experts - 8192 - chunks * CHUNK_TOKENS * (sums + 5 * experts)
    columns = int(room / (chunks * CHUNK_TOKENS * (3 * number + 0.25) + 4))
    units = math.ceil(sum(load.sizes) / 64)
    passes = math.ceil(units / max((columns - 15 * experts) // 64, columns // 16 // 64, 1))
    return math.ceil(units / passes) * 64


def passes(load: Load) -> list[Load]:
    """The experts as each pass sees them: clipped to its rows."""
    rows, total, out = rows_of_a_pass(load), sum(load.sizes), []
    for first in range(0, total, rows):
        clipped, begin = [], 0
        for size in load.sizes:
            end = begin + size
            clipped.append(max(0, min(end, first + rows) - max(begin, first)))
            begin = end
        there = [i for i, size in enumerate(clipped) if size]
        sizes = tuple(clipped[i] for i in there)
        out.append(replace(load, sizes=sizes, active=load.active[:, there]))
    return out


def neurons(gpu: Gpu, load: Load) -> list[Prediction]:
    """What every gradient is made of: g, u and da in one kernel, or da alone where g and u were
    saved; on sm_90a recomputed g and u wait in the workspace for da."""
    hidden, loop = load.hidden_size, gpu.loop
    saved = ", saved" if load.is_saved else ""
    if loop is not WGMMA:
        columns = 32 if loop is MMA and not load.is_saved else 64
        kernel = f"{loop.prefix}neurons_backward{saved}"
        products, rows, numbers = (1, 1, 5) if load.is_saved else (3, 2, 3)
        one = gathered(
            gpu, load, [(kernel, columns, ANY)], products, lambda s: rows * hidden + numbers * s
        )
        return [replace(one[0], kernel="neurons")]
    recompute = [(f"sm90a recompute<{c}>", c, most) for c, most in RECOMPUTE]
    rest = [(f"sm90a neurons<{c // 2}>{saved}", c, most) for c, most in NEURONS]
    return [
        *(() if load.is_saved else gathered(gpu, load, recompute, 2, lambda s: hidden + 2 * s)),
        *gathered(gpu, load, rest, 1, lambda s: hidden + 5 * s),
    ]


def dx(gpu: Gpu, load: Load, ends: bool) -> Prediction:
    """The forward's kernel, with two sources: one after the other but on sm_90a. ends: strips are
    cleared or y is written."""
    if gpu.loop is WGMMA:
        return down(gpu, load, sources=2, ends=ends)
    one = down(gpu, load)
    both = {k: 2 * v for k, v in one.parts.items()}
    return replace(one, tiles=2 * one.tiles, parts=both, seconds=2 * one.seconds)


def weights(gpu: Gpu, load: Load) -> list[Prediction]:
    """Three gradients, whose tiles have neurons as rows and tokens as steps: three launches, but
    one on sm_90a."""
    loop, hidden, launches = gpu.loop, load.hidden_size, 1 if gpu.loop is WGMMA else 3
    columns = 192 if loop is WGMMA else loop.strips[0][0]
    tile_rows = loop.tile_rows if loop is WGMMA else 64
    tiles, moved = [], 0.0
    for size, pairs in zip(load.sizes, load.active.sum(0).tolist(), strict=True):
        steps = math.ceil(pairs / loop.step_terms)
        for first in range(0, size, tile_rows):
            rows = min(size - first, tile_rows)
            tiles += [(rows, steps)] * math.ceil(hidden / columns)
        moved += pairs * (hidden + size) + size * hidden
    each = 3 // launches
    more_ctas = replace(gpu, loop=replace(MMA, ctas_per_sm=3)) if loop is MMA else gpu
    ctas = deal(more_ctas, tiles * each)
    moved *= each * load.number_bytes
    return [run_tiles(more_ctas, f"{loop.prefix}weights", ctas, moved)] * launches


def backward(gpu: Gpu, load: Load) -> list[Prediction]:
    """Every kernel, in order: what it takes in all passes."""
    by_pass = [
        [*neurons(gpu, part), dx(gpu, part, ends=i == 0), *weights(gpu, part)]
        for i, part in enumerate(passes(load))
    ]
    return [
        Prediction(
            same[0].kernel,
            sum(p.tiles for p in same),
            sum(p.waves for p in same),
            {name: sum(p.parts[name] for p in same) for name in same[0].parts},
            sum(p.seconds for p in same),
        )
        for same in zip(*by_pass, strict=True)
    ]
