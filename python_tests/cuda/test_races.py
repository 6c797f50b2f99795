"""The interpreter finds races, deadlocks and starvation in small CUDA kernels, under every
schedule; and counts right."""

import pathlib

import numpy as np
import pytest
from nvcc import ptx
from ptx import Counters, Device, Program, Trap

SOURCE = pathlib.Path(__file__).parent / "kernels_for_races.cu"
SEEDS = [None, 0, 1, 2, 3]
UNORDERED = "unordered|before it was written"


def program(fault=0):
    return Program(ptx(SOURCE, "sm_80", f"-DFAULT={fault}"))


def exchange(fault, seed=None, counters=None):
    device = Device(seed, counters)
    x = np.arange(256, dtype=np.int32)
    out = device.empty(256, np.int32)
    device.launch(program(fault), "exchange", (2, 1, 1), (128, 1, 1), args=[device.array(x), out])
    return out.array


@pytest.mark.parametrize("seed", SEEDS)
def test_exchange(seed):
    t = np.arange(256)
    np.testing.assert_array_equal(exchange(0, seed), ((t ^ 1) % 128 + 1) % 128 * 2 + t // 128 * 256)


@pytest.mark.parametrize("fault", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_exchange_without_a_barrier_is_a_race(fault, seed):
    with pytest.raises(Trap, match=UNORDERED):
        exchange(fault, seed)


def last_one_sums(fault, seed):
    device = Device(seed)
    x = np.arange(160, dtype=np.int32)
    partial, total = device.empty(160, np.int32), device.empty(1, np.int32)
    arrived = device.copy(np.zeros(1, np.uint32))
    device.launch(
        program(fault),
        "last_one_sums",
        (5, 1, 1),
        (64, 1, 1),
        args=[device.array(x), partial, arrived, total],
    )
    return total.array[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_release_and_acquire_between_ctas(seed):
    assert last_one_sums(0, seed) == 159 * 80


@pytest.mark.parametrize("fault", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_fence_between_ctas_is_a_race(fault, seed):
    with pytest.raises(Trap, match=UNORDERED):
        last_one_sums(fault, seed)


def chain(fault, seed):
    device = Device(seed)
    sums, out = device.empty(6, np.int32), device.empty(6, np.int32)
    flags = device.copy(np.zeros(6, np.int32))
    args = [device.array(np.arange(1, 7, dtype=np.int32)), sums, flags, out]
    device.launch(program(fault), "chain", (6, 1, 1), (32, 1, 1), args=args)
    return out.array.tolist()


@pytest.mark.parametrize("fault", [0, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_spinning_threads_do_not_starve_the_others(fault, seed):
    assert chain(fault, seed) == [0, 1, 3, 6, 10, 15]


@pytest.mark.parametrize("fault", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_unfenced_flags_are_a_race(fault, seed):
    with pytest.raises(Trap, match=UNORDERED):
        chain(fault, seed)


def test_trap_names_the_source_line():
    with pytest.raises(Trap, match=r"kernels_for_races.cu:\d+: ld.shared"):
        exchange(1)


def test_counters():
    counters = Counters()
    exchange(0, counters=counters)
    loads, stores = (
        counters.total({k: v for k, v in counters.sectors.items() if k[1] == op})
        for op in ("ld", "st")
    )
    assert (loads.requests, loads.units, loads.least) == (
        8,
        32,
        32,
    )  # 8 warps, 128 bytes each, whole sectors
    assert (stores.requests, stores.units, stores.least) == (8, 32, 32)
    assert counters.total(counters.cycles).excess == 0
    assert counters.instructions["barrier"] == 8 * 3


@pytest.mark.parametrize(("stride", "cycles"), [(1, 1), (2, 2), (3, 1), (32, 32), (0, 1)])
def test_bank_conflicts(stride, cycles):
    text = f"""
      .version 9.0 .target sm_80 .address_size 64
      .visible .entry k() {{ .reg .b32 %r<4>; .shared .align 16 .b8 buffer[4096];
        mov.u32 %r0, %tid.x; mul.lo.u32 %r0, %r0, {4 * stride};
        mov.u32 %r1, buffer; add.u32 %r1, %r1, %r0;
        st.shared.u32 [%r1], %r0; ret; }}"""
    counters = Counters()
    device = Device(counters=counters)
    if stride == 0:  # 32 lanes that store to one word are a race
        with pytest.raises(Trap, match="at once"):
            device.launch(Program(text), "k", (1, 1, 1), (32, 1, 1))
        return
    device.launch(Program(text), "k", (1, 1, 1), (32, 1, 1))
    assert counters.total(counters.cycles).units == cycles


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (64, 32)])
def test_sectors(stride, sectors):
    text = f"""
      .version 9.0 .target sm_80 .address_size 64
      .visible .entry k(.param .u64 p) {{ .reg .b32 %r<4>; .reg .b64 %a<4>;
        mov.u32 %r0, %tid.x; ld.param.u64 %a0, [p]; mad.wide.u32 %a0, %r0, {4 * stride}, %a0;
        st.global.u32 [%a0], %r0; ret; }}"""
    counters = Counters()
    device = Device(counters=counters)
    device.launch(
        Program(text), "k", (1, 1, 1), (32, 1, 1), args=[device.empty(32 * 64, np.uint32)]
    )
    total = counters.total(counters.sectors)
    assert (total.units, total.least) == (sectors, 4)
