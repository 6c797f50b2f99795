"""The backward in the model of GPU time (gpu_model.py): everything recomputed, in one pass."""

import math
from dataclasses import replace

from dsmoe_ext.benchmarks.gpu_model import (
    ANY,
    MMA,
    STRIP_COLUMNS,
    Gpu,
    Load,
    Prediction,
    deal,
    down,
    gathered,
    run_tiles,
)

# (columns of a tile, up to which size of expert)
RECOMPUTE, NEURONS = ((32, 32), (64, 128), (96, ANY)), ((64, 32), (128, 128), (160, ANY))


def neurons(gpu: Gpu, load: Load) -> list[Prediction]:
    """What every gradient is made of: by mma.sync in one kernel; else g and u wait in the
    workspace for the third product."""
    hidden = load.hidden_size
    if gpu.loop is MMA:
        one = gathered(
            gpu, load, [("neurons_backward", 32, ANY)], 3, lambda size: 2 * hidden + 3 * size
        )
        return [replace(one[0], kernel="neurons")]
    recompute = [(f"sm90a recompute<{c}>", c, most) for c, most in RECOMPUTE]
    rest = [(f"sm90a neurons<{c // 2}>", c, most) for c, most in NEURONS]
    return [
        *gathered(gpu, load, recompute, 2, lambda size: hidden + 2 * size),
        *gathered(gpu, load, rest, 1, lambda size: hidden + 5 * size),
    ]


def dx(gpu: Gpu, load: Load) -> Prediction:
    """The forward's kernel, with two sources: by mma.sync one after the other."""
    if gpu.loop is not MMA:
        return down(gpu, load, sources=2)
    one = down(gpu, load)
    both = {k: 2 * v for k, v in one.parts.items()}
    return replace(one, tiles=2 * one.tiles, parts=both, seconds=2 * one.seconds)


def weights(gpu: Gpu, load: Load) -> list[Prediction]:
    """Three gradients, whose tiles have neurons as rows and tokens as steps: three launches by
    mma.sync, else one."""
    if gpu.loop is MMA:
        gpu = replace(gpu, loop=replace(MMA, tile_rows=64, ctas_per_sm=3))
    columns, launches = (STRIP_COLUMNS, 3) if gpu.loop.ctas_per_sm > 1 else (192, 1)
    tiles, dram = [], 0.0
    for size, pairs in zip(load.sizes, load.active.sum(0).tolist(), strict=True):
        steps = math.ceil(pairs / gpu.loop.step_terms)
        for first in range(0, size, gpu.loop.tile_rows):
            rows = min(size - first, gpu.loop.tile_rows)
            tiles += [(rows, steps)] * math.ceil(load.hidden_size / columns)
        dram += 2.0 * (pairs * (load.hidden_size + size) + size * load.hidden_size)
    tiles, dram = tiles * (3 // launches), dram * (3 // launches)
    one = run_tiles(gpu, f"{gpu.loop.prefix}weights", deal(gpu, tiles), dram)
    return [one] * launches


def backward(gpu: Gpu, load: Load) -> list[Prediction]:
    """Every kernel, in order."""
    return [*neurons(gpu, load), dx(gpu, load), *weights(gpu, load)]
