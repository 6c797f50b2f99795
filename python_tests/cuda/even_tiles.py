"""Decisive cases of sm90a/even_tiles.cuh: tiles that make no whole round go in halves to idle CTAs.
No result shows whether they do: what does is how many boxes of weights the copy engine brings."""

import functools

import test_expert_mlp
import test_expert_mlp_backward
import torch
from machine_code import readable
from ops_under_test import ON_GPU

from dsmoe_ext.testing import error_bounds, random_case

# A lane counts every 32nd expert: lanes 0 to 3 four of the 100, in an unrolled loop, others three.
# Sizes are the least and the largest of their kernels and tiles.
SIZES = [16, 32, 33, 192, 0, 16, 33, 192] + [0] * 24 + [32, 8, 33, 129, 33] + [0] * 59
SIZES += [16, 17, 128, 8]
ROWS = {e: 130 for e in (0, 1, 2, 3, 34, 35, 36, 96, 97, 98)} | {e: 100 for e in (5, 6, 7, 32)}
TILES = {  # kernel: (sizes of its experts, columns of a tile)
    "gate_up_kernel<bfloat16,16>": (range(1, 17), 16),
    "gate_up_kernel<bfloat16,32>": (range(17, 33), 32),
    "gate_up_kernel<bfloat16,64>": (range(33, 129), 64),
    "gate_up_kernel<bfloat16,96>": (range(129, 999), 96),
    "recompute_kernel<bfloat16,32>": (range(1, 33), 32),
    "recompute_kernel<bfloat16,64>": (range(33, 129), 64),
    "recompute_kernel<bfloat16,96>": (range(129, 999), 96),
    "neurons_kernel<bfloat16,16": (range(1, 33), 32),
    "neurons_kernel<bfloat16,64": (range(33, 129), 128),
    "neurons_kernel<bfloat16,80": (range(129, 999), 160),
}


@functools.cache
def setting():
    """130 tokens and 100 experts, of which 14 are active in 100 or 130 tokens."""
    case = random_case(0, 130, 8, SIZES, active=1.0, dtype=torch.bfloat16)
    for expert in range(len(SIZES)):
        case.gates[ROWS.get(expert, 0) :, expert] = 0
    return case


def expected_boxes(kernel, ctas):
    """Two for a tile, which is a step as H is 8. If at most half of the CTAs would get one of those
    beyond whole rounds, the first so many are halved: of more than 128 rows, into two tiles."""
    sizes, columns = TILES[kernel]
    mine = (e for e in sorted(ROWS) if SIZES[e] in sizes)
    rows = [ROWS[e] for e in mine for _ in range(0, SIZES[e], columns)]
    odd = len(rows) % ctas
    halved = rows[:odd] if 2 * odd <= ctas else []
    return 2 * (len(rows) + sum(n > 128 for n in halved))


def check_boxes(ops, *kernels):
    if ON_GPU:
        return
    names = readable(sorted(ops.boxes))
    for kernel in kernels:
        (boxes,) = (n for name, n in ops.boxes.items() if f"sm90a::{kernel}" in names[name])
        assert boxes == expected_boxes(kernel, ops.multiprocessors), kernel


def check_forward(make, multiprocessors):
    ops = make(arch="90a", multiprocessors=multiprocessors)
    test_expert_mlp.check(setting(), ops, bounds())
    check_boxes(ops, *(kernel for kernel in TILES if kernel.startswith("gate_up")))


def check_backward(make, multiprocessors, saved):
    ops = make(arch="90a", multiprocessors=multiprocessors, workspace_mib=256)  # in one pass
    test_expert_mlp_backward.check(setting(), ops, bounds(), save_activations=saved)
    kinds = ("neurons",) if saved else ("recompute", "neurons")
    check_boxes(ops, *(kernel for kernel in TILES if kernel.startswith(kinds)))


@functools.cache
def bounds():
    return error_bounds(setting())
