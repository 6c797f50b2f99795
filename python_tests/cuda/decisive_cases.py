"""Small cases that together execute every instruction of every kernel that can be reached, and
decide whether it is right. mutate.py runs them on broken kernels, test_mutate.py as tests.

A case takes a function that makes the ops under test, and raises where the tests would.
"""

import functools
from dataclasses import replace

import even_tiles
import test_decode_quantized
import test_expert_mlp
import test_expert_mlp_backward
import test_permute
import test_route
import test_router
import test_tf32
import torch
from decisive_shapes import (
    BACKWARD,
    CODES,
    DECODE,
    FORWARD,
    HOPPER,
    HOPPER_BACKWARD,
    HOPPER_BACKWARD_ACTIVE,
    PERMUTE,
    ROUTE,
    ROUTER,
    SHAPES,
    TF32_BACKWARD,
    TF32_FORWARD,
    UNALIGNED,
)

from dsmoe_ext import reference
from dsmoe_ext.testing import error_bounds, random_case


def permute(tokens, experts, active):
    gates = test_permute.random_gates(0, tokens, experts, active)
    want = functools.cache(lambda: reference.permute(gates))

    def case(make):
        for got, wanted in zip(make().permute(gates), want(), strict=True):
            assert torch.equal(got, wanted)

    return case


def route(shape, method, gates="scores", rescale=True):
    top_k = min(3, len(shape[1]) - shape[2])
    options = dict(method=method, gates=gates, rescale=rescale, top_k=top_k, gate_scale=1.25)
    return lambda make: test_route.check(*shape, options, make())


def router(*shape, dtype=torch.bfloat16, apart=0):
    """Forward and backward; rows of x `apart` elements further apart than they are long."""
    x, *others = test_router.setting(*shape, dtype)
    wide = torch.full((len(x), x.shape[1] + apart), float("nan"), dtype=dtype)
    wide[:, : x.shape[1]] = x
    return lambda make: test_router.check(wide[:, : x.shape[1]], *others, make)


def nan_and_ties(method):
    """Equal logits, a NaN, and logits whose exponentials overflow."""

    def case(make):
        logits = torch.zeros(9, 171)  # five or six experts a lane: every copy of a loop
        logits[1, 7], logits[2, 170] = float("nan"), 1.0
        for i in range(6):
            logits[3 + i, 32 * i + 1] = 90.0
        options = dict(method=method, top_k=8)
        offsets = test_route.offsets_of([2] * 171)
        want = reference.route(logits.double(), torch.tensor(0.21), offsets, **options)
        gates, _ = make().route(logits, 0.21, offsets, **options)
        fine = [0, *range(2, 9)]
        torch.testing.assert_close(gates[fine].double(), want[0][fine], rtol=1e-5, atol=1e-5)
        assert gates[1].isnan().any()

    return case


def inputs_of(tokens, hidden, sizes, active, dtype=torch.bfloat16, exact_ste=False):
    """active: a probability, or the experts of which every token is active."""
    share = active if isinstance(active, float) else 1.0
    options = dict(active=share, exact_ste=exact_ste, dtype=dtype)
    inputs = random_case(0, tokens, hidden, sizes, **options)
    if share is not active:
        inputs.gates[:, [e for e in range(len(sizes)) if e not in active]] = 0
    return inputs


# Its formula has every term, exactly and as a polynomial, but for gelu_tanh's part of exact fp32.
ACTIVATION = "gelu"


def exact(activation=ACTIVATION):
    return functools.partial(reference.sparse_ffn, activation=activation)


def expert_mlp(*shape, activation=ACTIVATION, dtype=torch.bfloat16, **settings):
    """settings: of the ops, and which kernels."""
    inputs = functools.cache(lambda: inputs_of(*shape, dtype=dtype))
    bounds = functools.cache(lambda: error_bounds(inputs(), exact(activation)))

    def case(make):
        ops = make(**{"multiprocessors": 1, "parts": 1} | settings)
        ops.activation = activation
        test_expert_mlp.check(inputs(), ops, bounds())

    return case


def saved_on_hopper(*shape):
    """The forward for sm_90a keeps g and u; on a GPU the backward's cases see them."""
    inputs = functools.cache(lambda: inputs_of(*shape))

    def case(make):
        ops = make(arch="90a")
        if hasattr(ops, "launches"):
            test_expert_mlp.check_saved(inputs(), ops)

    return case


def expert_mlp_backward(
    *shape,
    save_activations=False,
    activation=ACTIVATION,
    dtype=torch.bfloat16,
    exact_ste=False,
    **settings,
):
    inputs = functools.cache(lambda: inputs_of(*shape, dtype=dtype, exact_ste=exact_ste))
    bounds = functools.cache(lambda: error_bounds(inputs(), exact(activation)))

    def case(make):
        ops = make(**{"multiprocessors": 1} | settings)
        ops.activation = activation
        test_expert_mlp_backward.check(inputs(), ops, bounds(), save_activations=save_activations)

    return case


def tf32(*shape, results):
    """float32 on tensor cores, to the bounds of test_tf32.py. results: what to check of a case, by
    ops."""
    inputs = functools.cache(lambda: inputs_of(*shape, exact_ste=True, dtype=torch.float32))
    expected = functools.cache(lambda: test_tf32.expect(inputs(), exact()))

    def case(make):
        ops = make()
        ops.allow_tf32, ops.activation = True, ACTIVATION
        test_tf32.check(results(inputs(), ops), expected())

    return case


def tf32_forward(*shape):
    return tf32(*shape, results=lambda case, ops: {"y": ops.sparse_ffn(*case.inputs())})


def tf32_backward(*shape, save_activations):
    return tf32(
        *shape,
        results=lambda case, ops: test_tf32.forward_and_backward(case, ops, save_activations),
    )


def later_tokens_without_experts(make):
    """A second pass over tokens that adds nothing leaves every bit of the first."""
    case = inputs_of(260, 136, [136, 136], 0.2)
    case.gates[256:] = 0
    first = replace(case, x=case.x[:256], gates=case.gates[:256], dy=case.dy[:256])
    want = test_expert_mlp_backward.gradients(first, make())
    got = test_expert_mlp_backward.gradients(case, make())
    for name in ("dgate_proj", "dup_proj", "ddown_proj_t"):
        assert torch.equal(got[name], want[name]), name


def decode_beside_nan(make):
    """Rows of an expert that no token uses are never read, not even where a unit has less rows."""
    case = inputs_of(3, 72, [5, 13, 8, 17, 3] * 4, [e for e in range(20) if e % 5 in (0, 2, 3)])
    idle = reference.expand_experts(case.gates, case.expert_offsets)[0] == 0
    case.down_proj_t[idle] = float("nan")
    y = make().sparse_ffn(*case.inputs())
    case.down_proj_t[idle] = 0
    assert torch.equal(y, make().sparse_ffn(*case.inputs()))


def decode_of_a_linear(tokens, hidden, sizes, multiprocessors=1):
    """Wd as [H,I]: of some experts every neuron lies at 16 bytes, of others none."""
    inputs = functools.cache(lambda: inputs_of(tokens, hidden, sizes, 0.5))
    bounds = functools.cache(lambda: error_bounds(inputs()))

    def case(make):
        case = replace(inputs(), down_proj_t=inputs().down_proj_t.t().contiguous().t())
        test_expert_mlp.check(case, make(multiprocessors=multiprocessors), bounds())

    return case


def decode_of_codes(name, *shape, multiprocessors=1):
    form = test_decode_quantized.FORMATS[name]
    inputs = functools.cache(lambda: replace(inputs_of(*shape), activation=ACTIVATION))
    expect = functools.cache(lambda: test_decode_quantized.expected(inputs(), form))
    return lambda make: test_decode_quantized.check(
        inputs(), form, make(multiprocessors=multiprocessors), expect()
    )


def cuts_change_nothing(tokens, size, dtype=torch.bfloat16):
    """Three small experts are summed as if they were one. They nearly cancel, so that a sum in
    another order would have other bits."""

    def case(make):
        cut = inputs_of(tokens, 200, [size] * 3, 1.0, dtype=dtype)
        cut.gates[:] = 1
        for weights in (cut.gate_proj, cut.up_proj):
            weights[:] = weights[:size].repeat(3, 1)
        for i, factor in enumerate((1.0, 0.02, -1.01)):
            cut.down_proj_t[i * size : (i + 1) * size] = cut.down_proj_t[:size] * factor
        offsets = test_route.offsets_of([3 * size])
        whole = replace(cut, gates=cut.gates[:, :1], expert_offsets=offsets)
        assert torch.equal(make().sparse_ffn(*cut.inputs()), make().sparse_ffn(*whole.inputs()))

    return case


def exponentials_are_exact(make):
    """Scores to a few units in the last place, which range reduction decides."""
    logits = torch.rand(64, 131, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for method, exact in (
        ("threshold", logits.double().sigmoid()),
        ("top_p", logits.double().softmax(1)),
        ("top_k", logits.double().softmax(1)),
    ):
        offsets = test_route.offsets_of([2] * 131)
        _, scores = make().route(logits, 0.5, offsets, method=method, top_k=3)
        assert ((scores / exact - 1).abs() <= 8 * torch.finfo(torch.float32).eps).all()


def list_pairs(make):
    """list_pairs_kernel with more pairs than threads, which takes 2^20 of them in the backward."""
    g = torch.Generator().manual_seed(0)
    gates, weights = (torch.rand(5000, generator=g) < 0.5 for _ in range(2))
    for with_active in (True, False):
        ops = make()
        if hasattr(ops, "launch"):
            arguments = (5000, gates.float(), weights.float(), with_active)
            listed = ops.launch("list_pairs_kernel", 2, 256, arguments, 5000)
            want = gates | weights if with_active else weights & ~gates
            assert torch.equal(listed, want.float())


CASES = {
    **{f"permute {shape}": permute(*shape) for shape in PERMUTE},
    **{
        f"route {method}, {name}": route(shape, method, gates, rescale)
        for method in reference.METHODS
        for name, (shape, gates, rescale) in ROUTE.items()
    },
    **{
        f"router, {name}, {dtype}": router(*shape, dtype=dtype, apart=24)
        for name, shape in ROUTER.items()
        for dtype in (torch.bfloat16, torch.float32)
    },
    **{f"route {method}, NaN and ties": nan_and_ties(method) for method in reference.METHODS},
    **{f"forward, {name}": expert_mlp(*shape) for name, shape in FORWARD.items()},
    **{
        f"forward, {name}, float32": expert_mlp(*shape, dtype=torch.float32)
        for name, shape in FORWARD.items()
        if name != "many"
    },
    **{f"sm_90a, {name}": expert_mlp(*shape, arch="90a") for name, shape in HOPPER.items()},
    **{
        f"{'sm_90a' if arch == '90a' else 'forward'}, sums in {parts} parts": expert_mlp(
            200, 136, [13, 200, 16, 29, 72], 0.5, arch=arch, parts=parts, multiprocessors=3
        )
        for arch in ("80", "90a")
        for parts in (2, 8)
    },
    "forward, gelu_tanh, float32": expert_mlp(
        *SHAPES["whole"], dtype=torch.float32, activation="gelu_tanh"
    ),
    **{
        f"backward, gelu_tanh{', saved' * save}, float32": expert_mlp_backward(
            *SHAPES["whole"],
            exact_ste=True,
            dtype=torch.float32,
            activation="gelu_tanh",
            save_activations=save,
        )
        for save in (False, True)
    },
    # of four row tiles, on Hopper two, where the other cases' groups have one
    **{
        f"{name}, larger groups": expert_mlp(1100, 8, [16, 24, 40, 72, 136], 1.0, group=512, **how)
        for name, how in (
            ("forward", {}),
            ("forward, float32", {"dtype": torch.float32}),
            ("sm_90a", {"arch": "90a"}),
        )
    },
    **{
        f"{name} backward, larger groups{', saved' * save}": expert_mlp_backward(
            1100, 8, [16, 40, 136], 1.0, group=512, save_activations=save, **how
        )
        for name, how in (
            ("sm_80", {}),
            ("float32", {"dtype": torch.float32}),
            ("sm_90a", {"arch": "90a"}),
        )
        for save in (False, True)
    },
    "sm_90a, small units": expert_mlp(
        530, 136, [64, 8, 8, 128], 0.3, arch="90a", multiprocessors=3
    ),
    **{f"sm_90a, {name}, saved": saved_on_hopper(*shape) for name, shape in SHAPES.items()},
    "sm_90a, whole row tiles, saved": saved_on_hopper(*HOPPER["whole row tiles"]),
    "sm_90a, two blocks of rows, saved": saved_on_hopper(130, 24, [13, 29, 67, 3], 1.0),
    **{
        f"decode, {name}": expert_mlp(*shape, multiprocessors=multiprocessors)
        for name, (shape, multiprocessors) in DECODE.items()
    },
    **{
        f"backward, {name}{', exact' * exact}": expert_mlp_backward(*shape, exact_ste=exact)
        for name, shape in BACKWARD.items()
        for exact in (False, True)
    },
    **{
        f"sm_90a backward, {name}{', saved' * save}": expert_mlp_backward(
            *shape, exact_ste=True, arch="90a", save_activations=save
        )
        for name, shape in HOPPER_BACKWARD.items()
        for save in (False, True)
    },
    **{
        f"sm_90a backward, {name}": expert_mlp_backward(*shape, arch="90a", **options)
        for name, (shape, options) in HOPPER_BACKWARD_ACTIVE.items()
    },
    **{
        f"backward, {name}, exact, float32": expert_mlp_backward(
            *shape, exact_ste=True, dtype=torch.float32
        )
        for name, shape in BACKWARD.items()
    },
    **{
        f"backward, {name}, saved, {dtype}": expert_mlp_backward(
            *shape, exact_ste=True, dtype=dtype, save_activations=True
        )
        for name, shape in BACKWARD.items()
        for dtype in (torch.bfloat16, torch.float32)
    },
    **{
        f"TF32, {name}{', saved' * save}": tf32_backward(*shape, save_activations=save)
        for name, shape in TF32_BACKWARD.items()
        for save in (False, True)
    },
    **{f"TF32 forward, {name}": tf32_forward(*shape) for name, shape in TF32_FORWARD.items()},
    "backward, unaligned, saved": expert_mlp_backward(*UNALIGNED, save_activations=True),
    "TF32, unaligned, saved": tf32_backward(*UNALIGNED, save_activations=True),
    "TF32, a whole tile in a later pass": tf32_backward(
        260, 136, [128, 16], 0.1, save_activations=False
    ),
    "backward, three parts of dgates in a later pass": expert_mlp_backward(
        40, 16, [33, 367, 64, 90], 0.5, exact_ste=True
    ),
    # two passes, since experts might have needed padding; none does, and one takes all columns
    "backward, an empty pass": expert_mlp_backward(40, 16, [16] * 24, 0.5),
    "backward, later tokens without experts": later_tokens_without_experts,
    **{
        f"sm_90a, even tiles, {n} multiprocessors": functools.partial(
            even_tiles.check_forward, multiprocessors=n
        )
        for n in (13, 7, 4, 2)  # 13: all kernels halve; else in one of several rounds, or not
    },
    **{
        f"sm_90a backward, even tiles{', saved' * save}": functools.partial(
            even_tiles.check_backward, multiprocessors=4, saved=save
        )
        for save in (False, True)
    },
    "decode beside NaN": decode_beside_nan,
    **{
        f"decode, codes of {form}, {name}": decode_of_codes(form, *shape, multiprocessors=n)
        for name, (shape, n) in CODES.items()
        for form in ("8", "8, groups of 32, mins", "4")
    },
    "decode of a Linear": decode_of_a_linear(9, 136, [8, 13, 27, 0, 40, 3, 5]),
    "decode of a Linear, parts": decode_of_a_linear(16, 72, [64, 200, 37, 19], 4),
    "decode of a Linear, rows apart": decode_of_a_linear(3, 72, [13, 72, 8]),
    "decode, cuts": cuts_change_nothing(16, 8),
    "forward, cuts": cuts_change_nothing(40, 16),
    "forward, cuts, float32": cuts_change_nothing(40, 16, torch.float32),
    "route, exponentials": exponentials_are_exact,
    "list_pairs": list_pairs,
}
