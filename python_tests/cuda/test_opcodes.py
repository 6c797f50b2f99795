"""Every integer opcode of the PTX interpreter against a scalar model in Python's exact numbers."""

import numpy as np
import pytest
import snippets
from ptx import Trap

BITS = {
    "s16": 16,
    "u16": 16,
    "b16": 16,
    "s32": 32,
    "u32": 32,
    "b32": 32,
    "s64": 64,
    "u64": 64,
    "b64": 64,
}


def wrap(value, kind):
    """The integer that a register of this type holds."""
    bits = BITS[kind]
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


def integers(kind, seed, count=96):
    """Edge values, small ones and random ones, as Python ints of the type."""
    rng = np.random.default_rng(seed)
    bits = BITS[kind]
    edges = [
        0,
        1,
        2,
        7,
        31,
        32,
        33,
        -1,
        -2,
        -7,
        (1 << bits - 1) - 1,
        1 << bits - 1,
        (1 << bits) - 1,
    ]
    values = edges + rng.integers(-100, 100, 30).tolist()
    while len(values) < count:
        values.append(int.from_bytes(rng.bytes(bits // 8), "little"))
    rng.shuffle(values)
    return [wrap(v, kind) for v in values[:count]]


def as_array(values, kind):
    return np.array([v & (1 << BITS[kind]) - 1 for v in values], f"u{BITS[kind] // 8}").view(
        kind.replace("b", "u").replace("s", "i")[0] + str(BITS[kind] // 8)
    )


def check_integer(instruction, kinds, result, model):
    """kinds: of the sources; model: Python ints -> int."""
    columns = [integers(k, i) for i, k in enumerate(kinds)]
    names = ["%x", "%y", "%z"][: len(kinds)]
    inputs = {n[1:]: (k, as_array(c, k)) for n, k, c in zip(names, kinds, columns, strict=True)}
    out = snippets.run(f"{instruction} %d, {', '.join(names)};", inputs, {"d": result}, threads=96)[
        "d"
    ]
    want = [wrap(model(*row), result) for row in zip(*columns, strict=True)]
    assert [int(v) for v in out] == want


def truncated(x, y):
    return -1 if y == 0 else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


TWO = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul.lo": lambda x, y: x * y,
    "div": truncated,
    "rem": lambda x, y: x if y == 0 else x - truncated(x, y) * y,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("op", TWO)
def test_integer_arithmetic(op, kind):
    check_integer(f"{op}.{kind}", [kind, kind], kind, TWO[op])


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_high_products(kind):
    bits = BITS[kind]
    check_integer(f"mul.hi.{kind}", [kind, kind], kind, lambda x, y: x * y >> bits)
    check_integer(f"mad.hi.{kind}", [kind] * 3, kind, lambda x, y, z: (x * y >> bits) + z)


@pytest.mark.parametrize(
    ("kind", "wide"), [("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")]
)
def test_wide_products(kind, wide):
    check_integer(f"mul.wide.{kind}", [kind, kind], wide, lambda x, y: x * y)
    check_integer(f"mad.wide.{kind}", [kind, kind, wide], wide, lambda x, y, z: x * y + z)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_multiply_add(kind):
    check_integer(f"mad.lo.{kind}", [kind] * 3, kind, lambda x, y, z: x * y + z)


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_logic(kind):
    check_integer(f"and.{kind}", [kind, kind], kind, lambda x, y: x & y)
    check_integer(f"or.{kind}", [kind, kind], kind, lambda x, y: x | y)
    check_integer(f"xor.{kind}", [kind, kind], kind, lambda x, y: x ^ y)
    check_integer(f"not.{kind}", [kind], kind, lambda x: ~x)


@pytest.mark.parametrize("kind", ["s32", "s64"])
def test_neg_abs(kind):
    check_integer(f"neg.{kind}", [kind], kind, lambda x: -x)
    check_integer(f"abs.{kind}", [kind], kind, abs)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xEA, 0x96, 0xCA, 0xFF, 0x1D])
def test_lop3(table):
    def model(a, b, c):
        return sum(
            (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i
            for i in range(32)
        )

    columns = [integers("b32", i) for i in range(3)]
    inputs = {n: ("b32", as_array(c, "b32")) for n, c in zip("xyz", columns, strict=True)}
    out = snippets.run(f"lop3.b32 %d, %x, %y, %z, {table};", inputs, {"d": "b32"}, threads=96)["d"]
    assert out.tolist() == [model(*row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "s16", "s32", "s64", "u16", "u32", "u64"])
def test_shifts(kind):
    bits = BITS[kind]
    amounts = [0, 1, 5, bits - 1, bits, bits + 1, 200] * 14
    values = integers(kind, 3)
    inputs = {"x": (kind, as_array(values, kind)), "s": ("u32", np.array(amounts[:96], np.uint32))}
    if kind[0] == "b":
        out = snippets.run(f"shl.{kind} %d, %x, %s;", inputs, {"d": kind}, threads=96)["d"]
        assert [int(v) for v in out] == [
            wrap(x << s, kind) for x, s in zip(values, amounts, strict=False)
        ]
    out = snippets.run(f"shr.{kind} %d, %x, %s;", inputs, {"d": kind}, threads=96)["d"]
    assert [int(v) for v in out] == [x >> s for x, s in zip(values, amounts, strict=False)]


@pytest.mark.parametrize("mode", ["l.wrap", "l.clamp", "r.wrap", "r.clamp"])
def test_funnel_shift(mode):
    def model(low, high, s):
        s = s & 31 if "wrap" in mode else min(s, 32)
        both = high << 32 | low
        return (both << s >> 32 if mode[0] == "l" else both >> s) & 0xFFFFFFFF

    low, high = integers("u32", 1), integers("u32", 2)
    amounts = [abs(v) % 70 for v in integers("u32", 4)]
    inputs = {
        n: ("u32", as_array(v, "u32")) for n, v in zip("xys", (low, high, amounts), strict=True)
    }
    out = snippets.run(f"shf.{mode}.b32 %d, %x, %y, %s;", inputs, {"d": "b32"}, threads=96)["d"]
    assert out.tolist() == [model(*row) for row in zip(low, high, amounts, strict=True)]


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counting(bits):
    kind = f"b{bits}"
    top = (1 << bits) - 1
    check_integer(f"popc.{kind}", [kind], "u32", lambda x: x.bit_count())
    check_integer(f"clz.{kind}", [kind], "u32", lambda x: bits - x.bit_length())
    check_integer(f"brev.{kind}", [kind], kind, lambda x: int(f"{x & top:0{bits}b}"[::-1], 2))
    check_integer(f"bfind.u{bits}", [f"u{bits}"], "u32", lambda x: x.bit_length() - 1)
    check_integer(
        f"bfind.shiftamt.u{bits}", [f"u{bits}"], "u32", lambda x: bits - x.bit_length() if x else -1
    )


def test_bit_field_extract():
    x, at, count = (
        integers("u32", 1),
        [v % 40 for v in integers("u32", 2)],
        [v % 34 for v in integers("u32", 3)],
    )
    inputs = {n: ("u32", as_array(v, "u32")) for n, v in zip("xyz", (x, at, count), strict=True)}
    out = snippets.run("bfe.u32 %d, %x, %y, %z;", inputs, {"d": "u32"}, threads=96)["d"]
    assert out.tolist() == [v >> a & (1 << c) - 1 for v, a, c in zip(x, at, count, strict=True)]


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_bit_field_insert(kind):
    bits = BITS[kind]
    x, y = integers(kind, 1), integers(kind, 4)
    at, count = [v % (bits + 8) for v in integers("b32", 2)], [v % 66 for v in integers("b32", 3)]
    inputs = {n: (kind, as_array(v, kind)) for n, v in (("x", x), ("y", y))}
    inputs |= {n: ("b32", as_array(v, "b32")) for n, v in (("z", at), ("w", count))}
    out = snippets.run(f"bfi.{kind} %d, %x, %y, %z, %w;", inputs, {"d": kind}, threads=96)["d"]

    def model(value, base, at, count):
        for i in range(count):
            if at + i < bits:
                base = base & ~(1 << at + i) | (value >> i & 1) << at + i
        return base

    assert out.tolist() == [model(*row) for row in zip(x, y, at, count, strict=True)]


def test_permute_bytes():
    def model(a, b, select):
        both, out = b << 32 | a, 0
        for i in range(4):
            nibble = select >> 4 * i & 15
            byte = both >> 8 * (nibble & 7) & 255
            out |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
        return out

    check_integer("prmt.b32", ["u32"] * 3, "u32", model)


# -- what it does not know, it refuses --


@pytest.mark.parametrize(
    "instruction",
    [
        "add.sat.s32 %d, %d, %d;",
        "mul24.lo.s32 %d, %d, %d;",
        "ex2.approx.f16 %d, %d;",
        "cvt.rz.bf16x2.f32 %d, %d, %d;",
        "made.up %d;",
    ],
)
def test_unknown_forms_trap(instruction):
    with pytest.raises(Trap):
        snippets.run("mov.b32 %d, 0;" + instruction, {}, {"d": "b32"})
