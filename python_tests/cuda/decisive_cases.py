"""The smallest cases that decide whether a kernel is right, by the start of the kernel's name.

A case takes a function that makes the ops under test, and raises where the tests would.
"""

import functools

import test_expert_mlp
import test_expert_mlp_backward
import test_permute
import test_route
import torch

from dsmoe_ext import reference
from dsmoe_ext.testing import random_case


def permute(tokens, experts, active):
    gates = test_permute.random_gates(0, tokens, experts, active)

    def case(make):
        for got, want in zip(make().permute(gates), reference.permute(gates), strict=True):
            assert torch.equal(got, want)

    return case


def route(method, gates, rescale, shape):
    options = dict(method=method, gates=gates, rescale=rescale, top_k=3, gate_scale=1.25)

    def case(make):
        original, test_route.Ops = test_route.Ops, make
        try:
            test_route.check(*shape, options)
        finally:
            test_route.Ops = original

    return case


def nan_and_ties(method):
    """Equal logits, a NaN, and logits whose exponentials overflow."""

    def case(make):
        logits = torch.zeros(9, 170)  # five or six experts a lane: every copy of a loop
        logits[1, 7] = float("nan")
        for i in range(6):
            logits[3 + i, 32 * i + 1] = 90.0
        options = dict(method=method, top_k=8)
        offsets = test_route.offsets_of([2] * 170)
        want = reference.route(logits.double(), torch.tensor(0.21), offsets, **options)
        gates, _ = make().route(logits, 0.21, offsets, **options)
        fine = [0, *range(2, 9)]
        torch.testing.assert_close(gates[fine].double(), want[0][fine], rtol=1e-5, atol=1e-5)
        assert gates[1].isnan().any()

    return case


def expert_mlp(tokens, hidden, sizes, active):
    inputs = functools.cache(
        lambda: random_case(0, tokens, hidden, sizes, active=active, dtype=torch.bfloat16)
    )
    return lambda make: test_expert_mlp.check(inputs(), make())


def expert_mlp_backward(tokens, hidden, sizes, active, exact_ste):
    options = dict(active=active, exact_ste=exact_ste, dtype=torch.bfloat16)
    inputs = functools.cache(lambda: random_case(0, tokens, hidden, sizes, **options))
    return lambda make: test_expert_mlp_backward.check(inputs(), make())


# loops are unrolled four times: experts and chunks beyond 128 take every copy, others the rest
PERMUTE = [
    permute(33, 3, 0.5),
    permute(300, 40, 0.4),
    permute(31, 70, 0.3),
    permute(256 * 33 + 5, 2, 0.3),
    permute(300, 301, 0.2),
    permute(256 * 130 + 5, 1, 0.3),
]
SHARED = (2, [2] * 170, 130)  # experts of which 130 are shared
ROUTE = {
    method: [
        route(method, "scores", True, test_route.SHAPES["unequal, shared"]),
        route(method, "binary", True, test_route.SHAPES["off the warp"]),
        route(method, "scores", False, test_route.SHAPES["many"]),
        route(method, "scores", True, test_route.SHAPES["many"]),
        route(method, "scores", True, SHARED),
        nan_and_ties(method),
    ]
    for method in reference.METHODS
}
# 130 rows use every 16-row block of a tile, and a second tile; with one multiprocessor a CTA goes
# through several tiles of every width
WHOLE = (130, 136, [72, 16, 16, 136, 32, 32], 1.0)
FINE = (40, 24, [16, 24, 80, 16, 0, 72, 8], 0.5)
RAGGED = (67, 56, [13, 29, 7, 1, 3], 0.5)
CHUNKS = (300, 40, [72, 40, 16], 0.5)
MANY = (17, 16, [2] * 512, 0.1)
LARGE_LAST = (40, 32, [8, 20, 72], 0.5)
FORWARD = [expert_mlp(*shape) for shape in (FINE, WHOLE, RAGGED, CHUNKS, MANY, LARGE_LAST)]
BACKWARD = [
    expert_mlp_backward(*shape, exact_ste)
    for shape in (FINE, WHOLE, RAGGED, (20, 24, [64, 32, 128, 64], 0.6))
    for exact_ste in (False, True)
]
DECODE = [
    expert_mlp(3, 264, [72, 16, 5], 0.6),
    expert_mlp(16, 40, [40, 24, 16, 7, 320], 0.5),
    expert_mlp(5, 16, [2] * 512, 0.1),
    expert_mlp(1, 1032, [32] * 4, 0.5),
    expert_mlp(2, 72, [5], 1.0),
]
CASES = {
    "count_kernel": PERMUTE,
    "scan_kernel": PERMUTE,
    "write_kernel": PERMUTE,
    **{
        f"{kernel}<(RouteMethod){i}>": ROUTE[method]
        for i, method in enumerate(("threshold", "top_p", "top_k", "relu"))
        for kernel in ("route_kernel", "route_backward_kernel")
    },
    "place_columns_kernel<bfloat16": FORWARD,
    "clear_inactive_kernel<bfloat16": FORWARD,
    "gate_up_kernel<bfloat16": FORWARD,
    "down_kernel<bfloat16": FORWARD,
    "neurons_kernel<bfloat16": DECODE,
    "outputs_kernel<bfloat16": DECODE,
    "list_pairs_kernel": BACKWARD,
    "neurons_backward_kernel<bfloat16": BACKWARD,
    "sum_dgates_kernel<bfloat16": BACKWARD,
    "weights_kernel<bfloat16": BACKWARD,
}
