"""Conversions of the interpreter against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import snippets
from test_opcodes import BITS, as_array, check_integer, integers, wrap
from test_opcodes_float import floats, rounded, same


def half_model(x, exponent_bits, mantissa_bits):
    """Nearest even to a 16-bit format, as bits, from exact fractions."""
    if math.isnan(x):
        return 0x7FFF
    sign = 0x8000 if math.copysign(1, x) < 0 else 0
    bias = (1 << exponent_bits - 1) - 1
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    if math.isinf(x):
        return sign | infinity
    x = abs(Fraction(x))
    if x == 0:
        return sign
    exponent = max(math.floor(math.log2(x)), 1 - bias)
    while Fraction(2) ** (exponent + 1) <= x:
        exponent += 1
    while exponent > 1 - bias and Fraction(2) ** exponent > x:
        exponent -= 1
    units = round(x / Fraction(2) ** (exponent - mantissa_bits))  # Fraction rounds half to even
    return sign | min(units + (exponent - (1 - bias)) * (1 << mantissa_bits), infinity)


@pytest.mark.parametrize(("kind", "exponent", "mantissa"), [("bf16", 8, 7), ("f16", 5, 10)])
def test_half_conversions(kind, exponent, mantissa):
    x, y = floats(1), floats(2)
    x[:8] = [
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        65504,
        65520,
        2.0**-24,
        2.0**-25,
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
    ]
    inputs = {"x": ("f32", x), "y": ("f32", y)}
    out = snippets.run(
        f"cvt.rn.{kind}x2.f32 %d, %x, %y; cvt.rn.{kind}.f32 %e, %x;",
        inputs,
        {"d": "b32", "e": "b16"},
        threads=96,
    )
    high, low = ([half_model(float(v), exponent, mantissa) for v in c] for c in (x, y))
    assert out["e"].tolist() == high
    assert out["d"].tolist() == [h << 16 | lo for h, lo in zip(high, low, strict=True)]


def test_finite_half_conversion():
    """Of 70000 and infinity the largest number, 65504; NaN stays."""
    numbers = [1.5, 65519, 65520, -7e4, np.inf, -np.inf, np.nan, -0.0]
    x = np.tile(np.array(numbers, np.float32), 4)
    inputs = {"x": ("f32", x), "y": ("f32", x[::-1].copy())}
    code = "cvt.rn.satfinite.f16x2.f32 %d, %x, %y;"
    out = snippets.run(code, inputs, {"d": "b32"}, threads=len(x))["d"]
    bits = [0x3E00, 0x7BFF, 0x7BFF, 0xFBFF, 0x7BFF, 0xFBFF, 0x7FFF, 0x8000]
    assert out.tolist() == [h << 16 | lo for h, lo in zip(bits, bits[::-1], strict=True)] * 4


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_half_to_float(kind):
    bits = np.arange(0, 1 << 16, 64, dtype=np.uint16)
    out = snippets.run(f"cvt.f32.{kind} %d, %x;", {"x": ("b16", bits)}, {"d": "f32"}, threads=1024)[
        "d"
    ]
    want = (
        (bits.astype(np.uint32) << 16).view(np.float32)
        if kind == "bf16"
        else bits.view(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(out, want)


def test_tf32_conversion():
    x = floats(4)
    out = snippets.run("cvt.rna.tf32.f32 %d, %x;", {"x": ("f32", x)}, {"d": "b32"}, threads=96)["d"]
    for value, bits in zip(x, out, strict=True):
        got = np.array(bits, np.uint32).view(np.float32)
        if np.isfinite(value) and abs(value) > 2.0**-100 and abs(value) < 1e38:
            step = Fraction(2) ** (math.frexp(float(value))[1] - 11)
            want = (
                math.floor(abs(Fraction(float(value))) / step + Fraction(1, 2)) * step
            )  # ties away from zero
            assert abs(Fraction(float(got))) == want
        elif not np.isfinite(value):
            assert same(got, value)


@pytest.mark.parametrize(
    ("to", "come"),
    [
        ("s64", "s32"),
        ("u64", "u32"),
        ("s32", "s64"),
        ("u32", "u64"),
        ("u32", "u16"),
        ("s32", "s16"),
        ("u16", "u32"),
        ("s64", "u32"),
    ],
)
def test_integer_conversion(to, come):
    check_integer(f"cvt.{to}.{come}", [come], to, lambda x: x)


@pytest.mark.parametrize("mode", ["rzi", "rni", "rmi", "rpi"])
@pytest.mark.parametrize("to", ["s32", "u32", "s64"])
def test_float_to_integer(mode, to):
    x = floats(7)
    x[:6] = [0.5, 1.5, -0.5, 2.5, 1e20, -1e20]
    out = snippets.run(f"cvt.{mode}.{to}.f32 %d, %x;", {"x": ("f32", x)}, {"d": to}, threads=96)[
        "d"
    ]
    low, high = (
        wrap(1 << BITS[to] - 1, to) if to[0] == "s" else 0,
        (1 << BITS[to] - (to[0] == "s")) - 1,
    )
    rounding = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[mode]
    for value, got in zip(x, out, strict=True):
        want = (
            0
            if np.isnan(value)
            else (high if value > 0 else low)
            if np.isinf(value)
            else rounding(Fraction(float(value)))
        )
        assert int(got) == min(max(want, low), high)


@pytest.mark.parametrize("come", ["s32", "u32", "s64", "u64"])
def test_integer_to_float(come):
    values = integers(come, 8)
    out = snippets.run(
        f"cvt.rn.f32.{come} %d, %x;",
        {"x": (come, as_array(values, come))},
        {"d": "f32"},
        threads=96,
    )["d"]
    assert out.tolist() == [rounded(Fraction(v)) for v in values]
