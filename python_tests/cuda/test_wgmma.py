"""wgmma of the interpreter against products of single elements, and what it must notice."""

import numpy as np
import pytest
from ptx import Counters, Device, Program, Trap
from ptx.numbers import ENCODE, bf16_to_f32, f16_to_f32

DECODE = {"bf16": bf16_to_f32, "f16": f16_to_f32}
BYTES = 40960  # of shared memory: the left matrix, and from RIGHT on the right one
RIGHT = 8192


def kernel(columns, body, left_registers=False):
    """128 threads copy words to shared memory, run the body, store their columns / 2 sums."""
    half = columns // 2
    fragments = "".join(
        f"ld.global.b32 %a{i}, [%p2+{4 * i}];" for i in range(4 if left_registers else 0)
    )
    zeros = "".join(f"mov.f32 %d{i}, 0f3F800000;" for i in range(half))
    stores = "".join(f"st.global.f32 [%p1+{4 * i}], %d{i};" for i in range(half))
    return Program(f"""
      .version 8.0 .target sm_90a .address_size 64
      .visible .entry k(.param .u64 image, .param .u64 out, .param .u64 fragments,
                        .param .u64 left, .param .u64 right, .param .u32 add) {{
        .reg .b32 %d<{half}>; .reg .b32 %a<4>; .reg .b32 %t<6>; .reg .b64 %p<6>; .reg .pred %q<3>;
        .reg .b64 %x<2>; .reg .b64 %wide;
        .shared .align 1024 .b8 buffer[{BYTES}];
        mov.u32 %t0, %tid.x; ld.param.u64 %p0, [image]; ld.param.u64 %p1, [out];
        mad.wide.u32 %p1, %t0, {4 * half}, %p1;
        ld.param.u64 %p2, [fragments]; mad.wide.u32 %p2, %t0, 16, %p2;
        ld.param.u64 %x0, [left]; ld.param.u64 %x1, [right];
        ld.param.u32 %t4, [add]; setp.ne.u32 %q1, %t4, 0;
        mov.u32 %t1, %t0;
        COPY:
        mul.wide.u32 %wide, %t1, 4; add.s64 %p3, %p0, %wide; ld.global.u32 %t2, [%p3];
        mov.u32 %t3, buffer; mad.lo.u32 %t3, %t1, 4, %t3; st.shared.u32 [%t3], %t2;
        add.u32 %t1, %t1, 128; setp.lt.u32 %q0, %t1, {BYTES // 4}; @%q0 bra COPY;
        {fragments} {zeros}
        {body}
        {stores}
        ret; }}""")


FENCES = "fence.proxy.async; bar.sync 0; wgmma.fence.sync.aligned;"
END = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def product(columns, kind, left, flags):
    sums = ",".join(f"%d{i}" for i in range(columns // 2))
    form = f"m64n{columns}k16.f32.{kind}.{kind}"
    return f"wgmma.mma_async.sync.aligned.{form} {{{sums}}}, {left}, %x1, %q1, 1, 1, {flags};"


def descriptor(start, leading, stride, width):
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def place_k(image, start, matrix, width):
    """Rows of `width` bytes, eight to a block, 16-byte chunks of a row changed about; returns the
    descriptor. Without a pattern: blocks of 8 rows by 16 bytes, two of them side by side."""
    for r, row in enumerate(matrix):
        for k in range(0, 16, 8):
            if width:
                line, chunk = start + r // 8 * 8 * width + r % 8 * width, k // 8
                at = line + (chunk ^ r % 8 * width // 128) * 16
            else:
                at = start + r // 8 * 256 + k // 8 * 128 + r % 8 * 16
            image[at : at + 16] = row[k : k + 8].view(np.uint8)
    return descriptor(start, 16 if width else 128, 8 * width or 256, width)


def place_mn(image, start, matrix, width):
    """The same for lines along the other way: a line holds width / 2 rows of one k."""
    rows = width // 2 or 8
    block = 16 * (width or 16)  # all 16 k of these rows
    for r in range(0, len(matrix), 8):
        for k in range(16):
            if width:
                line = start + r // rows * block + k * width
                at = line + (r % rows // 8 ^ k % 8 * width // 128) * 16
            else:
                at = start + r // 8 * 256 + k // 8 * 128 + k % 8 * 16
            image[at : at + 16] = matrix[r : r + 8, k].copy().view(np.uint8)
    if width:
        return descriptor(start, block, 8 * width, width)
    return descriptor(start, 128, 256, 0)


def launch(program, image, out, left, right, add=0, fragments=None, seed=None, counters=None):
    device = Device(seed, counters)
    sums = device.empty(out, np.float32)
    fragments = np.zeros((128, 4), np.uint32) if fragments is None else fragments
    arguments = [
        device.array(image.view(np.uint32)), sums, device.array(fragments), left, right, add
    ]  # fmt: skip
    device.launch(program, "k", (1, 1, 1), (128, 1, 1), args=arguments)
    return sums.array


def operands(columns, kind, seed=0):
    rng = np.random.default_rng(seed)
    A, B = (ENCODE[kind](rng.standard_normal((n, 16)).astype(np.float32)) for n in (64, columns))
    exact = DECODE[kind](A).astype(np.float64) @ DECODE[kind](B).T.astype(np.float64)
    return A, B, exact


def check(sums, exact):
    """d[4 j + 2 h + i], lane l, warp w: row 16 w + 8 h + l / 4, column 8 j + 2 (l % 4) + i."""
    for t in range(128):
        for i in range(sums.shape[1]):
            row = t // 32 * 16 + i // 2 % 2 * 8 + t % 32 // 4
            want = exact[row, i // 4 * 8 + t % 4 * 2 + i % 2]
            assert abs(sums[t, i]) <= abs(want) + 1e-12  # truncated
            assert abs(sums[t, i] - want) <= 2.0**-21 * abs(want) + 1e-12


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("right_mn", [0, 1])
@pytest.mark.parametrize("left_mn", [0, 1])
def test_layouts(width, left_mn, right_mn):
    columns = 128
    A, B, exact = operands(columns, "bf16")
    image = np.zeros(BYTES, np.uint8)
    left = (place_mn if left_mn else place_k)(image, 0, A, width)
    right = (place_mn if right_mn else place_k)(image, RIGHT, B, width)
    body = FENCES + product(columns, "bf16", "%x0", f"{left_mn}, {right_mn}") + END
    counters = Counters()
    check(launch(kernel(columns, body), image, (128, 64), left, right, counters=counters), exact)
    assert counters.products == 4 * columns // 8
    reads = [t for (_, op), t in counters.cycles.items() if op == "wgmma"]
    if width == 128:
        assert sum(t.units for t in reads) == (64 + columns) * 32 // 128
        assert all(t.excess == 0 for t in reads)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("columns", [8, 32, 64, 96, 256])
def test_widths_and_types(columns, kind):
    A, B, exact = operands(columns, kind)
    image = np.zeros(BYTES, np.uint8)
    left, right = place_k(image, 0, A, 128), place_k(image, RIGHT, B, 128)
    program = kernel(columns, FENCES + product(columns, kind, "%x0", "0, 0") + END)
    check(launch(program, image, (128, columns // 2), left, right), exact)
    again = launch(program, image, (128, columns // 2), left, right, add=1)  # sums were 1
    check(again, exact + 1)


def test_second_step_along_k_begins_within_the_pattern():
    A, B, exact = operands(16, "bf16")
    image = np.zeros(BYTES, np.uint8)
    for matrix, start in ((A, 0), (B, RIGHT)):
        for r, row in enumerate(matrix):
            for chunk in (2, 3):
                at = start + r * 128 + (chunk ^ r % 8) * 16
                image[at : at + 16] = row[8 * chunk - 16 : 8 * chunk - 8].view(np.uint8)
    left, right = (descriptor(s + 32, 16, 1024, 128) for s in (0, RIGHT))
    body = FENCES + product(16, "bf16", "%x0", "0, 0") + END
    check(launch(kernel(16, body), image, (128, 8), left, right), exact)


def test_left_from_registers():
    A, B, exact = operands(64, "bf16")
    image = np.zeros(BYTES, np.uint8)
    right = place_mn(image, RIGHT, B, 128)
    t = np.arange(128)
    fragments = np.zeros((128, 4), np.uint32)
    for i in range(4):  # rows 8 further, then columns 8 further
        row, k = t // 32 * 16 + t % 32 // 4 + i % 2 * 8, t % 4 * 2 + i // 2 * 8
        fragments[:, i] = A[row, k].astype(np.uint32) | A[row, k + 1].astype(np.uint32) << 16
    body = FENCES + product(64, "bf16", "{%a0,%a1,%a2,%a3}", "1") + END
    program = kernel(64, body, left_registers=True)
    check(launch(program, image, (128, 32), 0, right, fragments=fragments), exact)


GOOD = [
    "fence.proxy.async;",
    "bar.sync 0;",
    "wgmma.fence.sync.aligned;",
    product(16, "bf16", "%x0", "0, 0"),
    "wgmma.commit_group.sync.aligned;",
    "wgmma.wait_group.sync.aligned 0;",
    "bar.sync 0;",
    "mov.u32 %t3, buffer; st.shared.u32 [%t3], %t0;",
]
ONE_STORES = "setp.eq.u32 %q2, %t0, 0; mov.u32 %t3, buffer; @%q2 st.shared.u32 [%t3], %t0;"
FAULTS = {
    "stores that the tensor cores may not see": (0, "", "no fence.proxy.async"),
    "fence before the stores of others": (1, "", "unordered|no fence.proxy.async"),
    "registers not handed over": (2, "", "no wgmma.fence"),
    "a group never closed": (4, "", "wgmma in flight"),
    "sums read at once": (5, "", "belongs to a wgmma in flight"),
    "sums read while one group may be open": (
        5, "wgmma.wait_group.sync.aligned 1;", "belongs to a wgmma in flight"
    ),
    "sums changed in flight": (
        5, "mov.f32 %d3, 0f00000000; wgmma.wait_group.sync.aligned 0;", "in flight"
    ),
    "a matrix overwritten in flight": (
        5, "bar.sync 0;" + ONE_STORES + "wgmma.wait_group.sync.aligned 0;", "wgmma in flight"
    ),
    "a matrix overwritten before other warps are done": (6, "", "wgmma in flight"),
    "a part of the warpgroup": (3, "setp.lt.u32 %q2, %t0, 96; @%q2 " + GOOD[3], "only a part"),
    "other descriptors": (3, "cvt.u64.u32 %x0, %t0;" + GOOD[3], "differ"),
}  # fmt: skip


def run_steps(steps, seed):
    A, B, exact = operands(16, "bf16")
    image = np.zeros(BYTES, np.uint8)
    left, right = place_k(image, 0, A, 128), place_k(image, RIGHT, B, 128)
    return launch(kernel(16, " ".join(steps)), image, (128, 8), left, right, seed=seed), exact


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_protocol(seed):
    check(*run_steps([*GOOD[:-1], ONE_STORES], seed))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_faults(fault, seed):
    at, instead, message = FAULTS[fault]
    steps = GOOD[:-1] if "belongs" in message else [*GOOD[:-1], ONE_STORES]
    steps[at] = instead
    with pytest.raises(Trap, match=message):
        run_steps(steps, seed)


def test_unknown_forms():
    for form in ("m64n12k16.f32.bf16.bf16", "m64n16k8.f32.tf32.tf32", "m64n16k16.f16.f16.f16"):
        text = GOOD[3].replace("m64n16k16.f32.bf16.bf16", form)
        with pytest.raises(Trap, match="form of wgmma"):
            run_steps([*GOOD[:3], text, *GOOD[4:-1]], None)


def test_setmaxnreg():
    """128 threads may have 512 registers each, which is above what a thread can name."""
    lower, raise_it = (f"setmaxnreg.{w}.sync.aligned.u32 " for w in ("dec", "inc"))
    check(*run_steps([lower + "72;", raise_it + "216;", *GOOD[:-1]], None))
    for step in (raise_it + "216;", lower + "72;" + lower + "80;"):
        with pytest.raises(Trap, match="registers of a thread"):
            run_steps([step, *GOOD[:-1]], None)
    for step in (lower + "20;", lower + "73;", raise_it + "264;"):
        with pytest.raises(Trap, match="form of setmaxnreg"):
            run_steps([step, *GOOD[:-1]], None)
    part = "setp.eq.u32 %q2, %t0, 0; @%q2 " + lower + "72;"
    with pytest.raises(Trap, match="only a part"):
        run_steps([part, *GOOD[:-1]], None)
