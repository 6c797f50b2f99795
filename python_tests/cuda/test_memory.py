"""Loads, stores, atomics and asynchronous copies: what they do, and what they trap."""

import numpy as np
import pytest
import snippets
from ptx import Device, Program, Trap

LANES = np.arange(32, dtype=np.uint32)
SHARED = ".reg .b32 %at; .shared .align 16 .b8 buffer[2048];"


def kernel(body, buffers, *, grid=1, threads=32, seed=None, shared_bytes=0, counters=None):
    """Runs a body with %p0, %p1 ... as the buffers' addresses and %t, %c as thread and CTA."""
    params = ", ".join(f".param .u64 p{i}" for i in range(len(buffers[1])))
    loads = "".join(f"ld.param.u64 %p{i}, [p{i}];" for i in range(len(buffers[1])))
    text = (
        snippets.HEAD
        + f".visible .entry k({params})\n{{\n.reg .b64 %p<8>; .reg .b64 %a<8>; .reg .b32 %r<16>;"
        ".reg .f32 %f<8>; .reg .b16 %h<8>; .reg .b32 %t, %c; .reg .pred %q<4>;"
        ".shared .align 16 .b8 buffer[2048];\n"
        f"mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; {loads}\n{body}\nret;\n}}\n"
    )
    device, args = buffers
    device.seed, device.counters = seed, counters
    device.launch(Program(text), "k", (grid, 1, 1), (threads, 1, 1), shared_bytes, args)


@pytest.mark.parametrize(
    ("op", "model"),
    [
        ("add", lambda o, v: o + v),
        ("max", max),
        ("min", min),
        ("exch", lambda o, v: v),
        ("or", lambda o, v: o | v),
        ("and", lambda o, v: o & v),
        ("xor", lambda o, v: o ^ v),
    ],
)
@pytest.mark.parametrize("seed", [None, 1])
def test_atomics_on_one_word(op, model, seed):
    device = Device()
    out, old = device.copy(np.full(1, 99, np.uint32)), device.empty(32, np.uint32)
    kind = "b32" if op in ("exch", "or", "and", "xor") else "u32"
    body = f"""atom.global.{op}.{kind} %r1, [%p0], %t;
      mad.wide.u32 %a1, %t, 4, %p1; st.global.u32 [%a1], %r1;"""
    kernel(body, (device, [out, old]), seed=seed)
    if op == "exch":  # everyone took what somebody left: a chain through all of them
        assert sorted([*old.array, *out.array]) == sorted([99, *range(32)])
        return
    order = np.argsort(old.array, kind="stable") if op == "add" else range(32)
    value = 99
    for t in order:
        if op == "add" and t > 0:  # thread 0 adds nothing, so it shares its neighbour's value
            assert old.array[t] == value
        value = model(value, t)
    assert out.array[0] == value


def test_compare_and_swap_and_red():
    device = Device()
    out = device.copy(np.array([3, 0], np.uint32))
    kernel("atom.global.cas.b32 %r1, [%p0], 3, 40; red.global.add.u32 [%p0+4], 2;", (device, [out]))
    assert out.array.tolist() == [40, 64]


def test_float_atomic_in_shared_memory():
    device = Device()
    out = device.empty(1, np.float32)
    body = """mov.u32 %r0, buffer; setp.eq.u32 %q0, %t, 0;
      @%q0 st.shared.f32 [%r0], 0f00000000; bar.sync 0;
      cvt.rn.f32.u32 %f0, %t; atom.shared.add.f32 %f1, [%r0], %f0; bar.sync 0;
      @%q0 ld.shared.f32 %f2, [%r0]; @%q0 st.global.f32 [%p0], %f2;"""
    kernel(body, (device, [out]), threads=64, seed=2)
    assert out.array[0] == 64 * 63 / 2


def test_vectors_of_floats_are_added_in_place():
    rng = np.random.default_rng(3)
    before, x = (rng.normal(size=64).astype(np.float32) for _ in range(2))
    before[:4], x[:4] = [1e-39, 2e-38, -1e-39, 0], [0, -1.5e-38, -1e-38, -1e-39]
    device = Device()
    out, added = device.copy(np.tile(before, 2)), device.copy(x)
    body = """mad.wide.u32 %a0, %t, 8, %p0; mad.wide.u32 %a1, %t, 8, %p1;
      ld.global.v2.f32 {%f0, %f1}, [%a1]; red.global.add.v2.f32 [%a0], {%f0, %f1};
      add.s64 %a0, %a0, 256; atom.global.add.v2.f32 {%f2, %f3}, [%a0], {%f0, %f1};
      st.global.v2.f32 [%a1], {%f2, %f3};"""
    kernel(body, (device, [out, added]))
    red, atom = out.array.reshape(2, 64)
    assert not red[:4].any()  # of subnormals, and where the sum is one
    np.testing.assert_array_equal(red[4:], before[4:] + x[4:])
    np.testing.assert_array_equal(atom, red)
    np.testing.assert_array_equal(added.array, before)
    with pytest.raises(Trap, match="order"):
        kernel("red.global.add.v2.f32 [%p0], {%f0, %f0};", (device, [out]))


def test_vector_and_narrow_accesses():
    device = Device()
    x = device.array(np.arange(128, dtype=np.uint32))
    out = device.empty(128, np.uint32)
    body = """mad.wide.u32 %a0, %t, 16, %p0; mad.wide.u32 %a1, %t, 16, %p1;
      ld.global.nc.v4.u32 {%r0, %r1, %r2, %r3}, [%a0]; st.global.v2.u32 [%a1], {%r3, %r2};
      st.global.u32 [%a1+8], %r1; cvt.u16.u32 %h0, %r0;
      st.global.u16 [%a1+12], %h0; st.global.u16 [%a1+14], %h0;"""
    kernel(body, (device, [x, out]))
    low = x.array[::4]
    np.testing.assert_array_equal(
        out.array.reshape(32, 4), np.stack([low + 3, low + 2, low + 1, low | low << 16], 1)
    )


def test_vectors_of_floats_in_shared_memory():
    x, y = (np.random.default_rng(seed).normal(size=32).astype(np.float32) for seed in (0, 1))
    out = snippets.run(
        "mov.u32 %at, buffer; mad.lo.u32 %at, %tid32, 8, %at;"
        "st.shared.v2.f32 [%at], {%x, %y}; ld.shared.v2.f32 {%d, %e}, [%at];",
        {"x": ("f32", x), "y": ("f32", y)},
        {"d": "f32", "e": "f32"},
        declare=SHARED,
    )
    np.testing.assert_array_equal(out["d"], x)
    np.testing.assert_array_equal(out["e"], y)


def test_signed_loads_extend():
    out = snippets.run(
        "mov.u32 %at, buffer; mad.lo.u32 %at, %tid32, 2, %at; st.shared.u16 [%at], %x;"
        "ld.shared.s16 %d, [%at]; ld.shared.u16 %e, [%at];",
        {"x": ("u16", np.full(32, 0xFFFE))},
        {"d": "s32", "e": "u32"},
        declare=SHARED,
    )
    assert (out["d"] == -2).all()
    assert (out["e"] == 0xFFFE).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r0, [%p0+64];", "has 64"),
        ("ld.global.u32 %r0, [%p0+-4];", "wild"),
        ("ld.global.u32 %r0, [%p0+2];", "misaligned"),
        ("ld.global.v4.u32 {%r0,%r1,%r2,%r3}, [%p0+56];", "has 64"),
        ("ld.global.u32 %r0, [%p1];", "before it was written"),
        ("setp.eq.u32 %q0, %t, 0; @%q0 st.global.u32 [%p0], %t;", "read-only"),
        ("mov.u32 %r0, buffer; ld.shared.u32 %r1, [%r0];", "before it was written"),
        ("ld.shared.u32 %r1, [4096];", "of 2048"),
        ("mov.u32 %r0, buffer; ld.shared.u32 %r1, [%r0+2];", "misaligned"),
        ("ld.global.u32 %r0, [%p5];", "wild"),
        ("mov.u32 %r0, buffer; cp.async.cg.shared.global [%r0], [%p0+56], 16;", "has 64"),
        ("trap;", "trap"),
    ],
)
def test_bad_accesses_trap(body, message):
    device = Device()
    with pytest.raises(Trap, match=message):
        kernel(body, (device, [device.array(np.zeros(16, np.uint32)), device.empty(16, np.uint32)]))


COPY = """mov.u32 %r0, buffer; mad.lo.u32 %r0, %t, 16, %r0;
  mad.wide.u32 %a0, %t, 16, %p0; mad.wide.u32 %a1, %t, 4, %p1;"""


def copied(body, seed=None, threads=32):
    device = Device()
    x, out = device.array(np.arange(4 * threads, dtype=np.uint32)), device.empty(threads, np.uint32)
    kernel(
        COPY + body + "st.global.u32 [%a1], %r1;", (device, [x, out]), seed=seed, threads=threads
    )
    return out.array


def test_async_copy_and_zero_fill():
    body = """cp.async.cg.shared.global [%r0], [%a0], 16; cp.async.commit_group;
      cp.async.wait_group 0; ld.shared.u32 %r1, [%r0+4];"""
    assert copied(body).tolist() == (LANES * 4 + 1).tolist()
    body = "and.b32 %r2, %t, 1; shl.b32 %r2, %r2, 4;" + body.replace("16;", "16, %r2;", 1)
    assert copied(body).tolist() == np.where(LANES % 2, LANES * 4 + 1, 0).tolist()


def test_async_copy_groups_land_in_order():
    body = """cp.async.ca.shared.global [%r0], [%a0], 4; cp.async.commit_group;
      cp.async.ca.shared.global [%r0+4], [%a0+4], 4; cp.async.commit_group;
      cp.async.wait_group 1; ld.shared.u32 %r1, [%r0];"""
    assert copied(body).tolist() == (LANES * 4).tolist()
    with pytest.raises(Trap, match="asynchronously"):
        copied(body.replace("[%r0];", "[%r0+4];"))
    assert (
        copied(body.replace("[%r0];", "[%r0+4];").replace("wait_group 1", "wait_all")).tolist()
        == (LANES * 4 + 1).tolist()
    )


@pytest.mark.parametrize(
    "tail",
    [
        "ld.shared.u32 %r1, [%r0];",  # no wait
        "cp.async.commit_group; ld.shared.u32 %r1, [%r0];",  # commit is not wait
        "cp.async.wait_group 0; ld.shared.u32 %r1, [%r0];",  # not committed
        "cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 %r1, [%r0];",  # one too few
        "st.shared.u32 [%r0], 1; cp.async.wait_all; ld.shared.u32 %r1, [%r0];",
        "cp.async.wait_all; xor.b32 %r0, %r0, 16; ld.shared.u32 %r1, [%r0];",  # no barrier
    ],
)
def test_async_copy_needs_wait_and_barrier(tail):
    with pytest.raises(Trap):
        copied("cp.async.cg.shared.global [%r0], [%a0], 16;" + tail)


def test_async_copy_of_a_neighbour_after_a_barrier():
    body = """cp.async.cg.shared.global [%r0], [%a0], 16; cp.async.wait_all; bar.sync 0;
      xor.b32 %r0, %r0, 16; ld.shared.u32 %r1, [%r0];"""
    assert copied(body, seed=1, threads=128).tolist() == ((np.arange(128) ^ 1) * 4).tolist()
