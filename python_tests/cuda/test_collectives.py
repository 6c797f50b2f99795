"""Shuffles, votes, barriers and ldmatrix/mma of the interpreter against scalar models."""

import numpy as np
import pytest
import snippets
from ptx import Trap
from ptx.numbers import bf16_to_f32, f32_to_bf16, f32_to_tf32

LANES = np.arange(32, dtype=np.uint32)


def shuffled(mode, lane, by, clamp):
    """(source lane, in range), after the pseudo code in the PTX manual."""
    segment, bound = clamp >> 8 & 31, clamp & 31
    high = (lane & segment) | (bound & ~segment)
    low = lane & segment
    j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[mode]
    inside = j >= high if mode == "up" else j <= high
    return (j if inside else lane), inside


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, width):
    value = np.random.default_rng(0).integers(0, 1 << 32, 64, dtype=np.uint32)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    for by in (0, 1, 3, 8, 16, 31):
        out = snippets.run(
            f"shfl.sync.{mode}.b32 %d|%p, %x, {by}, {clamp}, -1;",
            {"x": ("b32", value)},
            {"d": "b32", "p": "pred"},
            threads=64,
        )
        for t in range(64):
            source, inside = shuffled(mode, t % 32, by, clamp)
            assert out["d"][t] == value[t // 32 * 32 + source]
            assert out["p"][t] == inside


def test_shfl_by_a_different_lane_each():
    value, by = LANES * 7, LANES[::-1].copy()
    out = snippets.run(
        "shfl.sync.idx.b32 %d, %x, %y, 31, -1;",
        {"x": ("b32", value), "y": ("b32", by)},
        {"d": "b32"},
    )
    assert out["d"].tolist() == value[by].tolist()


def test_votes():
    rng = np.random.default_rng(1)
    for share in (0.0, 0.5, 1.0):
        p = rng.random(64) < share
        out = snippets.run(
            "vote.sync.ballot.b32 %b, %x, -1; vote.sync.any.pred %any, %x, -1;"
            "vote.sync.all.pred %all, %x, -1; vote.sync.uni.pred %uni, %x, -1;",
            {"x": ("pred", p)},
            {"b": "b32", "any": "pred", "all": "pred", "uni": "pred"},
            threads=64,
        )
        for w in range(2):
            lanes = p[32 * w : 32 * w + 32]
            assert (
                out["b"][32 * w : 32 * w + 32] == sum(int(v) << i for i, v in enumerate(lanes))
            ).all()
            assert (out["any"][32 * w : 32 * w + 32] == lanes.any()).all()
            assert (out["all"][32 * w : 32 * w + 32] == lanes.all()).all()
            assert (out["uni"][32 * w : 32 * w + 32] == (lanes.all() or not lanes.any())).all()


def test_partial_mask_works_within_it():
    snippet = "setp.lt.u32 %q, %tid32, 8; mov.u32 %d, 0; @%q vote.sync.ballot.b32 %d, %x, 255;"
    p = LANES % 2 == 0
    out = snippets.run(snippet, {"x": ("pred", p)}, {"d": "b32", "q": "pred"})["d"]
    assert out.tolist() == [0x55] * 8 + [0] * 24


@pytest.mark.parametrize("op", ["add", "min", "max"])
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_redux(op, kind):
    x = (
        np.random.default_rng(2)
        .integers(0, 1 << 32, 32, dtype=np.uint32)
        .view("i4" if kind == "s32" else "u4")
    )
    out = snippets.run(f"redux.sync.{op}.{kind} %d, %x, -1;", {"x": (kind, x)}, {"d": kind})["d"]
    values = [int(v) for v in x]
    want = {"add": sum, "min": min, "max": max}[op](values) & 0xFFFFFFFF
    assert (out.view(np.uint32) == want).all()


def test_divergent_lanes_meet_at_the_collective():
    """Half of the warp takes a detour first; all must still see each other."""
    snippet = """
      setp.lt.u32 %q, %tid32, 16;
      mov.u32 %d, %x;
      @%q bra JOIN;
      mul.lo.u32 %d, %d, 3;
    JOIN:
      shfl.sync.bfly.b32 %d, %d, 16, 31, -1;"""
    for seed in (None, 1, 2, 3):
        out = snippets.run(snippet, {"x": ("u32", LANES)}, {"d": "u32", "q": "pred"}, seed=seed)[
            "d"
        ]
        moved = np.where(LANES < 16, LANES, LANES * 3)
        assert out.tolist() == moved[LANES ^ 16].tolist()


def test_barriers_that_ask():
    """Of two barriers and two registers, each after its own kind; both answers, in any order."""
    snippet = """mov.u32 %d, 7; setp.ge.u32 %q, %tid32, 64; @%q bra OTHER;
      barrier.cta.red.or.pred %any, 1, 64, %vote; selp.u32 %d, 1, 0, %any; bra OUT;
      OTHER: bar.red.or.pred %other, 2, 32, %vote; selp.u32 %d, 3, 2, %other;
      OUT: bar.red.or.pred %all, 0, %vote;"""
    for voters in ([], [5], [40, 70], [95]):
        vote = np.isin(np.arange(96), voters)
        for seed in (None, 0, 1):
            out = snippets.run(
                snippet,
                {"vote": ("pred", vote)},
                {"d": "u32", "q": "pred", "any": "pred", "other": "pred", "all": "pred"},
                threads=96,
                seed=seed,
            )
            assert out["d"].tolist() == [vote[:64].any()] * 64 + [2 + vote[64:].any()] * 32
            assert (out["all"] == vote.any()).all()


def test_registers_of_a_block_hide_those_of_the_function():
    """As nvcc writes __syncthreads_or."""
    snippet = """setp.lt.u32 %p1, %tid32, 8; selp.u32 %d, 1, 0, %p1;
      { .reg .pred %p1; setp.ne.u32 %p1, %d, 0; bar.red.or.pred %p1, 0, %p1; selp.u32 %d, 1, 0, %p1;
      }
      selp.u32 %word, 2, 0, %p1; add.u32 %d, %d, %word;"""
    out = snippets.run(snippet, {}, {"d": "u32"}, declare=".reg .pred %p1;")
    assert out["d"].tolist() == [3] * 8 + [1] * 24


@pytest.mark.parametrize(
    "snippet",
    [
        "setp.lt.u32 %q, %tid32, 32; @%q bar.red.or.pred %q, 0, %q; @!%q bar.sync 0;",
        "setp.lt.u32 %q, %tid32, 16; @%q shfl.sync.bfly.b32 %d, %x, 1, 31, -1;",  # half never comes
        "setp.lt.u32 %q, %tid32, 16; @%q bar.warp.sync -1;",
        "setp.lt.u32 %q, %tid32, 16; @%q bar.sync 0;",
        "setp.lt.u32 %q, %tid32, 32; @%q bar.sync 0;",  # the other warp never comes
        "setp.lt.u32 %q, %tid32, 16; @%q ret; bar.warp.sync -1;",
        "vote.sync.ballot.b32 %d, %q, 255;",  # lanes that the mask does not name
        "setp.lt.u32 %q, %tid32, 32; @%q ret; bar.sync 0;",
        "setp.lt.u32 %q, %tid32, 32; @%q ret; bar.sync 1, 64;",  # counted, and some have left
    ],
)
def test_incomplete_collectives_trap(snippet):
    for seed in (None, 5):
        with pytest.raises(Trap):
            snippets.run(
                "setp.eq.u32 %q, %tid32, 99;" + snippet,
                {"x": ("u32", np.arange(64))},
                {"d": "u32", "q": "pred"},
                threads=64,
                seed=seed,
            )


def test_a_counted_barrier_does_without_those_who_left():
    snippet = """mov.u32 %d, 0; setp.ge.u32 %q, %tid32, 64; @%q bra OUT;
      mov.u32 %at, buffer; mad.lo.u32 %at, %tid32, 4, %at; st.shared.u32 [%at], %x;
      bar.sync 1, 64;
      mov.u32 %at, buffer; xor.b32 %d, %tid32, 32; mad.lo.u32 %at, %d, 4, %at;
      ld.shared.u32 %d, [%at];
      OUT:"""
    for seed in (None, 0, 1):
        out = snippets.run(
            snippet,
            {"x": ("u32", np.arange(96))},
            {"d": "u32", "q": "pred"},
            threads=96,
            seed=seed,
            declare=".reg .b32 %at; .shared .align 16 .b8 buffer[256];",
        )["d"]
        assert out.tolist() == [*range(32, 64), *range(32), *[0] * 32]


# -- tensor cores --


def test_matrix_multiply_fragments():
    """mma against the products of single elements: A, B and C are loaded lane by lane as the
    manual's figures say."""
    rng = np.random.default_rng(3)
    for _kind, encode, decode, name in (
        ("bf16", f32_to_bf16, bf16_to_f32, "m16n8k16.row.col.f32.bf16.bf16.f32"),
        (
            "f16",
            lambda v: v.astype(np.float16).view(np.uint16),
            lambda b: b.view(np.float16).astype(np.float32),
            "m16n8k16.row.col.f32.f16.f16.f32",
        ),
    ):
        A, B = (encode(rng.standard_normal(s).astype(np.float32)) for s in ((16, 16), (16, 8)))
        C = rng.standard_normal((16, 8)).astype(np.float32)
        inputs = {}
        group, four = LANES // 4, LANES % 4
        for i in range(4):  # a0: (row g, columns 2q..), a1: row g + 8, a2: columns + 8, a3: both
            row, column = group + 8 * (i % 2), 2 * four + 8 * (i // 2)
            inputs[f"a{i}_"] = (
                "b32",
                A[row, column].astype(np.uint32) | A[row, column + 1].astype(np.uint32) << 16,
            )
        for i in range(2):  # b0: (rows 2q.., column g), b1: rows + 8
            row = 2 * four + 8 * i
            inputs[f"b{i}_"] = (
                "b32",
                B[row, group].astype(np.uint32) | B[row + 1, group].astype(np.uint32) << 16,
            )
        for i in range(4):
            inputs[f"c{i}_"] = ("f32", C[group + 8 * (i // 2), 2 * four + i % 2])
        check_mma(name, inputs, decode(A), decode(B), C)


def test_tf32_fragments():
    rng = np.random.default_rng(4)
    A, B, C = (rng.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8), (16, 8)))
    group, four = LANES // 4, LANES % 4
    inputs = {}
    for i in range(4):  # a0: (g, q), a1: (g + 8, q), a2: (g, q + 4), a3: (g + 8, q + 4)
        inputs[f"a{i}_"] = ("b32", f32_to_tf32(A[group + 8 * (i % 2), four + 4 * (i // 2)]))
    for i in range(2):  # b0: (q, g), b1: (q + 4, g)
        inputs[f"b{i}_"] = ("b32", f32_to_tf32(B[four + 4 * i, group]))
    for i in range(4):
        inputs[f"c{i}_"] = ("f32", C[group + 8 * (i // 2), 2 * four + i % 2])
    A, B = (f32_to_tf32(v).view(np.float32) for v in (A, B))
    check_mma("m16n8k8.row.col.f32.tf32.tf32.f32", inputs, A, B, C)


def check_mma(name, inputs, A, B, C):
    a, b, c = (
        "{" + ",".join(f"%{x}{i}_" for i in range(n)) + "}"
        for x, n in (("a", 4), ("b", 2), ("c", 4))
    )
    out = snippets.run(
        f"mma.sync.aligned.{name} {{%d0_,%d1_,%d2_,%d3_}}, {a}, {b}, {c};",
        inputs,
        {f"d{i}_": "f32" for i in range(4)},
    )
    exact = A.astype(np.float64) @ B.astype(np.float64) + C
    D = np.empty((16, 8), np.float32)
    for i in range(4):
        D[LANES // 4 + 8 * (i // 2), 2 * (LANES % 4) + i % 2] = out[f"d{i}_"]
    assert (np.abs(D) <= np.abs(exact)).all()  # truncated, so never too long
    np.testing.assert_allclose(D, exact, rtol=2.0**-22, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    """Eight rows of eight 16-bit numbers per matrix, from addresses in shuffled order."""
    rows = np.random.default_rng(count).permutation(8 * count).astype(np.uint32)
    words = (
        np.arange(32 * 4, dtype=np.uint32).reshape(32, 4) * 0x00020002 + 0x00010000
    )  # each thread stores one row
    order = np.zeros(32, np.uint32)
    order[: 8 * count] = rows
    inputs = {f"w{i}_": ("u32", words[:, i].copy()) for i in range(4)} | {"row": ("u32", order)}
    targets = ",".join(f"%d{i}_" for i in range(count))
    form = f"x{count}.trans" if transposed else f"x{count}"
    snippet = f"""
      mov.u32 %at, buffer; mad.lo.u32 %at, %tid32, 16, %at;
      st.shared.v4.u32 [%at], {{%w0_, %w1_, %w2_, %w3_}};
      bar.sync 0;
      mov.u32 %at, buffer; mad.lo.u32 %at, %row, 16, %at;
      ldmatrix.sync.aligned.m8n8.{form}.shared.b16 {{{targets}}}, [%at];"""
    declare = ".reg .b32 %at; .shared .align 16 .b8 buffer[512];"
    out = snippets.run(snippet, inputs, {f"d{i}_": "b32" for i in range(count)}, declare=declare)
    numbers = words.view(np.uint16).reshape(32, 8)
    for i in range(count):
        matrix = numbers[rows[8 * i : 8 * i + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            low, high = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert out[f"d{i}_"][lane] == int(low) | int(high) << 16


def test_ldmatrix_and_mma_need_the_whole_warp():
    snippet = """setp.lt.u32 %q, %tid32, 31; mov.u32 %d, 0;
      @%q ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%d}, [%d];"""
    with pytest.raises(Trap, match="part of the warp"):
        snippets.run(snippet, {}, {"d": "b32", "q": "pred"}, shared_bytes=128)
