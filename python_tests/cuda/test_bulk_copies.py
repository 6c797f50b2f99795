"""mbarriers and bulk copies of the interpreter: what they do, and what it must notice."""

import numpy as np
import pytest
from ptx import Device, Program, Trap
from ptx.bulk import MAGIC, MAP

BASE, BARRIER = 0, 16384  # of the tile and of the mbarrier in shared memory


def tensor_map(buffer, rows, columns, stride, box, swizzle=128):
    """What fake_runtime.cpp writes: a matrix of 16-bit numbers, box (columns, rows)."""
    made = np.zeros(1, MAP)[0]
    made["magic"], made["type_bytes"], made["rank"], made["swizzle"] = MAGIC, 2, 2, swizzle
    made["address"], made["size"], made["stride"] = buffer.address, (columns, rows), 2 * stride
    made["box"] = box
    return made.tobytes() + bytes(128 - MAP.itemsize)


INIT = """setp.eq.u32 %q0, %t0, 0; mov.u32 %t1, buffer; add.u32 %t2, %t1, 16384;
  @%q0 mbarrier.init.shared::cta.b64 [%t2], 1;"""
SHOW = "@%q0 fence.mbarrier_init.release.cluster;"
MEET = "bar.sync 0;"
EXPECT = "@%q0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%t2], %t3;"
COPY = (
    "@%q0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
    "[%t1], [%p1, {%t4, %t5}], [%t2];"
)
WAIT = """WAIT{n}: mbarrier.try_wait.parity.shared::cta.b64 %q1, [%t2], {parity};
  @!%q1 bra WAIT{n};"""
STORE = """mov.u32 %t6, %t0; setp.ge.u32 %q2, %t6, %t8; @%q2 ret;
  STORE: mad.lo.u32 %t7, %t6, 16, %t1; ld.shared.v4.u32 {%d0, %d1, %d2, %d3}, [%t7];
  mul.wide.u32 %p2, %t6, 16; add.s64 %p2, %p2, %p0;
  st.global.v4.u32 [%p2], {%d0, %d1, %d2, %d3};
  add.u32 %t6, %t6, 64; setp.lt.u32 %q2, %t6, %t8; @%q2 bra STORE;"""
STEPS = [INIT, SHOW, MEET, EXPECT, COPY, WAIT.format(n=0, parity=0), STORE]


def run(steps, data, box, corner, swizzle=128, seed=None, expect=None, stride=None):
    """64 threads; one of them copies the box; all store it to the result."""
    text = f"""
      .version 8.0 .target sm_90a .address_size 64
      .visible .entry k(.param .align 64 .b8 map[128], .param .u64 out, .param .u32 x,
                        .param .u32 y, .param .u32 expect, .param .u32 chunks) {{
        .reg .b32 %t<9>; .reg .b32 %d<4>; .reg .b64 %p<3>; .reg .pred %q<3>;
        .shared .align 1024 .b8 buffer[{BARRIER + 64}];
        mov.b64 %p1, map; cvta.param.u64 %p1, %p1;
        mov.u32 %t0, %tid.x; ld.param.u64 %p0, [out]; ld.param.u32 %t4, [x];
        ld.param.u32 %t5, [y]; ld.param.u32 %t3, [expect]; ld.param.u32 %t8, [chunks];
        {" ".join(steps)} ret; }}"""
    device = Device(seed)
    buffer = device.array(data)
    total = box[0] * box[1] * 2
    out = device.empty((box[1], box[0]), np.uint16)
    rows, columns = data.shape[0], data.shape[1] if stride is None else stride
    described = tensor_map(buffer, rows, columns, data.shape[1], box, swizzle)
    arguments = [described, out, *(c & 0xFFFFFFFF for c in corner), expect or total, total // 16]
    device.launch(Program(text), "k", (1, 1, 1), (64, 1, 1), args=arguments)
    return out.array


def numbers(rows, columns):
    return np.arange(1, rows * columns + 1, dtype=np.uint16).reshape(rows, columns)


def tile(data, box, corner, swizzle):
    """The box by hand: zeros outside, 16-byte chunks of a row changed about."""
    out = np.zeros((box[1], box[0]), np.uint16)
    for r in range(box[1]):
        for c in range(box[0]):
            y, x = corner[1] + r, corner[0] + c
            at = (c // 8 ^ r % 8 * swizzle // 128) * 8 + c % 8 if swizzle else c
            if 0 <= y < data.shape[0] and 0 <= x < data.shape[1]:
                out[r, at] = data[y, x]
    return out


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("corner", [(0, 0), (8, 3), (-8, -2), (56, 20), (200, 0)])
@pytest.mark.parametrize("seed", [None, 0])
def test_tile(swizzle, corner, seed):
    data = numbers(24, 72)
    box = (swizzle // 2 or 24, 16)
    got = run(STEPS, data, box, corner, swizzle, seed)
    np.testing.assert_array_equal(got, tile(data, box, corner, swizzle))


EARLY = "bulk copy writes|before it was written"
FAULTS = {
    "mbarrier not shown": (1, "", "no fence between"),
    "mbarrier not awaited by others": (2, "", "unordered|no mbarrier"),
    "nothing expected": (3, "", "ends while|deadlock|without waiting"),
    "nothing copied": (4, "", "deadlock"),
    "not waited for": (5, "", EARLY),
    "the phase before": (5, WAIT.format(n=0, parity=1), EARLY + "|for the one before"),
    "the phase after": (
        5, WAIT.format(n=0, parity=0) + WAIT.format(n=1, parity=1), "deadlock"
    ),
    "one waits, the others do not": (
        5, "@!%q0 bra WAIT1; " + WAIT.format(n=0, parity=0) + "WAIT1:", EARLY
    ),
    "copied twice to one place": (4, COPY + COPY, EARLY),
    "two phases at once": (3, EXPECT + EXPECT, "more arrivals"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_faults(fault, seed):
    at, instead, message = FAULTS[fault]
    steps = list(STEPS)
    steps[at] = instead
    with pytest.raises(Trap, match=message):
        run(steps, numbers(16, 64), (64, 16), (0, 0), seed=seed)


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("expect", [16, 64 * 16 * 2 + 16])
def test_wrong_number_of_bytes(expect, seed):
    with pytest.raises(Trap, match="deadlock"):
        run(STEPS, numbers(16, 64), (64, 16), (0, 0), seed=seed, expect=expect)


def test_stores_need_a_fence_before_a_bulk_copy():
    before = "@%q0 st.shared.u32 [%t1], %t0;"
    for fence, ok in (("", False), ("@%q0 fence.proxy.async;", True)):
        steps = [*STEPS[:4], before, fence, *STEPS[4:]]
        if ok:
            run(steps, numbers(16, 64), (64, 16), (0, 0))
        else:
            with pytest.raises(Trap, match="no fence"):
                run(steps, numbers(16, 64), (64, 16), (0, 0))


def test_a_tile_out_of_its_memory_or_place():
    with pytest.raises(Trap, match="global access at byte"):
        run(STEPS, numbers(16, 64), (64, 16), (8, 8), stride=72)
    with pytest.raises(Trap, match="pattern begins elsewhere"):
        run([*STEPS[:3], "add.u32 %t1, %t1, 128;", *STEPS[3:]], numbers(9, 64), (64, 8), (0, 0))
    with pytest.raises(Trap, match="no mbarrier at"):
        run([*STEPS[:4], "add.u32 %t2, %t2, 8;", *STEPS[4:]], numbers(9, 64), (64, 8), (0, 0))


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("fault", [None, "empty", "full", "arrive early"])
def test_producer_and_consumer(fault, seed):
    """A warp hands 6 words to another through one slot: full and empty mbarriers, 32 arrivals."""
    full, empty = "[%t1+8]", "[%t1+16]"
    wait = """{name}: mbarrier.try_wait.parity.shared::cta.b64 %q1, {of}, %t4;
      @!%q1 bra {name};"""
    arrive = "mbarrier.arrive.shared::cta.b64 _, {of};"
    produce = [
        "" if fault == "empty" else "xor.b32 %t4, %t4, 1;" + wait.format(name="E", of=empty)
        + "xor.b32 %t4, %t4, 1;",
        arrive.format(of=full) if fault == "arrive early" else "",
        "@%q2 st.shared.u32 [%t1], %t5;",
        "" if fault == "arrive early" else arrive.format(of=full),
    ]  # fmt: skip
    consume = [
        "" if fault == "full" else wait.format(name="F", of=full),
        "ld.shared.u32 %t6, [%t1]; @%q2 st.global.u32 [%p0], %t6; add.s64 %p0, %p0, 4;",
        arrive.format(of=empty),
    ]
    loop = "xor.b32 %t4, %t4, 1; add.u32 %t5, %t5, 1; setp.lt.u32 %q0, %t5, 6; @%q0 bra {to};"
    text = f"""
      .version 8.0 .target sm_90a .address_size 64
      .visible .entry k(.param .u64 out) {{
        .reg .b32 %t<8>; .reg .b64 %p<2>; .reg .pred %q<4>; .shared .align 8 .b8 buffer[32];
        mov.u32 %t0, %tid.x; mov.u32 %t1, buffer; ld.param.u64 %p0, [out];
        setp.eq.u32 %q0, %t0, 0;
        @%q0 mbarrier.init.shared::cta.b64 {full}, 32;
        @%q0 mbarrier.init.shared::cta.b64 {empty}, 32;
        bar.sync 0;
        mov.u32 %t4, 0; mov.u32 %t5, 0; and.b32 %t2, %t0, 31; setp.eq.u32 %q2, %t2, 0;
        setp.ge.u32 %q3, %t0, 32; @%q3 bra CONSUME;
        PRODUCE: {" ".join(produce)} {loop.format(to="PRODUCE")} ret;
        CONSUME: {" ".join(consume)} {loop.format(to="CONSUME")} ret; }}"""
    device = Device(seed)
    out = device.empty(6, np.uint32)

    def launch():
        device.launch(Program(text), "k", (1, 1, 1), (64, 1, 1), args=[out])

    if fault is None:
        launch()
        assert out.array.tolist() == list(range(6))
    else:
        seen = r"unordered|before it was|more arrivals|several|deadlock|still be waiting"
        with pytest.raises(Trap, match=seen):
            launch()


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("meet", ["bar.warp.sync 0xffffffff;", ""])
def test_one_lane_arrives_for_its_warp(meet, seed):
    """Two warps take turns. Where a lane may still be waiting, it might miss the phase."""
    turn = """{name}: mbarrier.try_wait.parity.shared::cta.b64 %q1, [%t1+{wait}], {parity};
      @!%q1 bra {name}; {meet} @%q2 mbarrier.arrive.shared::cta.b64 _, [%t1+{arrive}];
      xor.b32 %t4, %t4, 1; add.u32 %t5, %t5, 1; setp.lt.u32 %q0, %t5, 6; @%q0 bra {name}; ret;"""
    first = turn.format(name="A", wait=16, parity="%t6", meet="bar.warp.sync 0xffffffff;", arrive=8)
    second = turn.format(name="B", wait=8, parity="%t4", meet=meet, arrive=16)
    text = f"""
      .version 8.0 .target sm_90a .address_size 64
      .visible .entry k() {{
        .reg .b32 %t<8>; .reg .pred %q<4>; .shared .align 8 .b8 buffer[32];
        mov.u32 %t0, %tid.x; mov.u32 %t1, buffer; setp.eq.u32 %q0, %t0, 0;
        @%q0 mbarrier.init.shared::cta.b64 [%t1+8], 1;
        @%q0 mbarrier.init.shared::cta.b64 [%t1+16], 1;
        bar.sync 0;
        mov.u32 %t4, 0; mov.u32 %t5, 0; and.b32 %t2, %t0, 31; setp.eq.u32 %q2, %t2, 0;
        setp.ge.u32 %q3, %t0, 32; @%q3 bra B;
        {first.replace("A:", "A: xor.b32 %t6, %t4, 1;", 1)} {second} }}"""
    device = Device(seed)
    if meet:
        device.launch(Program(text), "k", (1, 1, 1), (64, 1, 1), args=[])
    else:
        with pytest.raises(Trap, match="may still be waiting for the one before"):
            device.launch(Program(text), "k", (1, 1, 1), (64, 1, 1), args=[])
