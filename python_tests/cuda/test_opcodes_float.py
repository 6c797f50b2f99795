"""Float arithmetic and comparisons of the interpreter against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import snippets
from test_opcodes import as_array, integers


def floats(seed, count=96):
    rng = np.random.default_rng(seed)
    edges = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        np.inf,
        -np.inf,
        np.nan,
        2.0**-149,
        -(2.0**-130),
        3.4e38,
        2.0**24 + 2,
        0.1,
    ]
    values = np.concatenate(
        [
            edges,
            rng.standard_normal(count - len(edges))
            * 2.0 ** rng.integers(-30, 30, count - len(edges)),
        ]
    )
    rng.shuffle(values)
    return values.astype(np.float32)


def rounded(exact):
    """A Fraction to the nearest float32, ties to even. Exact: by comparing with the neighbours."""
    if exact == 0:
        return np.float32(0)
    guess = np.float32(float(exact))
    options = [
        guess,
        np.nextafter(guess, np.float32(np.inf)),
        np.nextafter(guess, np.float32(-np.inf)),
    ]
    options = [o for o in options if np.isfinite(o)]
    return min(
        options,
        key=lambda o: (abs(Fraction(float(o)) - exact), int(np.array(o).view(np.uint32)) & 1),
    )


def same(a, b):
    return (np.isnan(a) and np.isnan(b)) or (a == b)


@pytest.mark.parametrize(
    "op", ["add.f32", "sub.f32", "mul.f32", "div.rn.f32", "fma.rn.f32", "add.rn.f32"]
)
def test_float_arithmetic_is_correctly_rounded(op):
    x, y, z = floats(1), floats(2), floats(3)
    x[:4], y[:4], z[:4] = (
        1 + 2.0**-23,
        1 - 2.0**-24,
        [-1, 2.0**-60, -(2.0**-60), -1 + 2.0**-24],
    )  # cancellation, sticky bits
    names = "xyz" if op.startswith("fma") else "xy"
    inputs = {n: ("f32", v) for n, v in zip("xyz", (x, y, z), strict=True) if n in names}
    out = snippets.run(
        f"{op} %d, {', '.join('%' + n for n in names)};", inputs, {"d": "f32"}, threads=96
    )["d"]
    exact = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "fma": None,
    }
    checked = 0
    for i in range(96):
        values = [Fraction(float(v[i])) if np.isfinite(v[i]) else None for v in (x, y, z)]
        if None in values[: len(names)] or (op.startswith("div") and values[1] == 0):
            continue
        want = values[0] * values[1] + values[2] if names == "xyz" else exact[op[:3]](*values[:2])
        if abs(want) < 3.4e38:
            assert out[i] == rounded(want), (x[i], y[i], z[i])
            checked += 1
    assert checked > 50


def test_fma_at_the_halfway_points():
    """1 + 2^-24 lies between two floats; a third term far below decides."""
    tiny = [0.0, 2.0**-60, -(2.0**-60), 2.0**-149]
    one, half = np.float32(1), np.float32(2.0**-24)
    x = np.tile(
        np.float32([one, one + 2 * half]), 16
    )  # to even: down from the first, up from the other
    for z in tiny:
        # x + 2^-24 exactly, as a product, plus z
        a, b = np.full(32, 2.0**-12, np.float32), np.full(32, 2.0**-12, np.float32)
        inputs = {"x": ("f32", a), "y": ("f32", b), "z": ("f32", x)}
        plain = snippets.run("fma.rn.f32 %d, %x, %y, %z;", inputs, {"d": "f32"})["d"]
        assert plain.tolist() == [rounded(Fraction(float(v)) + Fraction(2) ** -24) for v in x]
        p, q = np.float32(1 + 2.0**-12), np.float32(1 - 2.0**-12 if z <= 0 else 1 + 2.0**-12)
        inputs = {"x": ("f32", np.full(32, p)), "y": ("f32", np.full(32, q))}
        inputs["z"] = ("f32", np.full(32, z))
        got = snippets.run("fma.rn.f32 %d, %x, %y, %z;", inputs, {"d": "f32"})["d"][0]
        assert got == rounded(Fraction(float(p)) * Fraction(float(q)) + Fraction(z))


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_fma(mode):
    x, y, z = (np.nan_to_num(floats(i), posinf=7, neginf=-7) for i in (1, 2, 3))
    x[:3], y[:3], z[:3] = 1 + 2.0**-23, 1 - 2.0**-24, [-1, 2.0**-60, -(2.0**-60)]
    inputs = {n: ("f32", v) for n, v in zip("xyz", (x, y, z), strict=True)}
    out = snippets.run(f"fma.{mode}.f32 %d, %x, %y, %z;", inputs, {"d": "f32"}, threads=96)["d"]
    for a, b, c, got in zip(x, y, z, out, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        if abs(exact) > 3e38:
            continue
        wanted = rounded(exact)
        down = (
            np.float32(-np.inf)
            if mode == "rm" or (mode == "rz" and exact > 0)
            else np.float32(np.inf)
        )
        beyond = Fraction(float(wanted)) - exact
        if (beyond > 0 and down < 0) or (beyond < 0 and down > 0):
            wanted = np.nextafter(wanted, down)
        assert got == wanted


def test_saturation():
    x = np.array([-1, -0.0, 0.25, 1, 2, np.nan, np.inf, -np.inf] * 4, np.float32)
    out = snippets.run("cvt.sat.f32.f32 %d, %x;", {"x": ("f32", x)}, {"d": "f32"})["d"]
    assert out[:8].tolist() == [0, 0, 0.25, 1, 1, 0, 1, 0]


def test_float_special_values():
    x = np.array([np.nan, 1, np.inf, -np.inf, np.nan, 0.0] * 16, np.float32)
    y = np.array([1, np.nan, -np.inf, 2, np.nan, np.inf] * 16, np.float32)
    inputs = {"x": ("f32", x), "y": ("f32", y)}
    for op, model in (("min", np.fmin), ("max", np.fmax), ("add", np.add), ("mul", np.multiply)):
        out = snippets.run(f"{op}.f32 %d, %x, %y;", inputs, {"d": "f32"}, threads=96)["d"]
        with np.errstate(invalid="ignore"):
            assert all(map(same, out, model(x, y)))


def test_flush_to_zero():
    x = np.array([2.0**-130, -(2.0**-130), 2.0**-126, 1.0] * 8, np.float32)
    inputs = {"x": ("f32", x)}
    out = snippets.run("mul.ftz.f32 %d, %x, 0f3F800000;", inputs, {"d": "f32"})["d"]
    np.testing.assert_array_equal(out[:4], [0, 0, 2.0**-126, 1])
    out = snippets.run("mul.f32 %d, %x, 0f3F800000;", inputs, {"d": "f32"})["d"]
    np.testing.assert_array_equal(out, x)


APPROXIMATE = {  # opcode -> (exact function, relative error that the PTX manual allows)
    "ex2.approx.f32": (lambda x: 2.0**x, 2.0**-22),
    "ex2.approx.ftz.f32": (lambda x: 2.0**x, 2.0**-22),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, 2.0**-23),
    "lg2.approx.f32": (math.log2, 2.0**-22),
    "sqrt.approx.f32": (math.sqrt, 2.0**-23),
    "rsqrt.approx.f32": (lambda x: 1 / math.sqrt(x), 2.0**-22.9),
    "tanh.approx.f32": (math.tanh, 2.0**-11),
}


@pytest.mark.parametrize("op", APPROXIMATE)
def test_approximations_err_but_within_their_bound(op):
    exact, bound = APPROXIMATE[op]
    x = np.abs(np.random.default_rng(0).standard_normal(512) * 5 + 3).astype(
        np.float32
    ) + np.float32(2.0)
    out = snippets.run(f"{op} %d, %x;", {"x": ("f32", x)}, {"d": "f32"}, threads=512)["d"]
    want = np.array([exact(float(v)) for v in x])
    error = np.abs(out / want - 1)
    assert error.max() <= bound
    assert (
        out != want.astype(np.float32)
    ).mean() > 0.1  # they are allowed to be wrong, so they are


def test_division_approx():
    x, y = floats(5)[:64], floats(6)[:64]
    x, y = (
        np.where(np.isfinite(v) & (np.abs(v) > 1e-6) & (np.abs(v) < 1e6), v, 3).astype(np.float32)
        for v in (x, y)
    )
    inputs = {"x": ("f32", x), "y": ("f32", y)}
    out = snippets.run("div.approx.f32 %d, %x, %y;", inputs, {"d": "f32"}, threads=64)["d"]
    assert np.abs(out / (x.astype(np.float64) / y) - 1).max() <= 2.0**-22


COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


@pytest.mark.parametrize(
    "op, kind",
    [
        *((op, kind) for kind in ("s32", "u32", "s64", "u64", "u16") for op in COMPARISONS),
        ("eq", "b32"),  # bits have no order
        ("ne", "b32"),
    ],
)
def test_setp_integers(op, kind):
    x, y = integers(kind, 1), integers(kind, 2)
    y[::3] = x[::3]
    inputs = {"x": (kind, as_array(x, kind)), "y": (kind, as_array(y, kind))}
    out = snippets.run(f"setp.{op}.{kind} %d, %x, %y;", inputs, {"d": "pred"}, threads=96)["d"]
    assert out.tolist() == [COMPARISONS[op](a, b) for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("op", [*COMPARISONS, *(f"{op}u" for op in COMPARISONS), "nan", "num"])
def test_setp_floats(op):
    x, y = floats(1), floats(2)
    y[::3] = x[::3]
    inputs = {"x": ("f32", x), "y": ("f32", y)}
    out = snippets.run(f"setp.{op}.f32 %d, %x, %y;", inputs, {"d": "pred"}, threads=96)["d"]
    for a, b, got in zip(x, y, out, strict=True):
        unordered = bool(np.isnan(a) or np.isnan(b))
        if op in ("nan", "num"):
            want = unordered == (op == "nan")
        elif op in COMPARISONS:
            want = not unordered and COMPARISONS[op](a, b)
        else:
            want = unordered or COMPARISONS[op[:-1]](a, b)
        assert got == want


@pytest.mark.parametrize("combine", ["and", "or", "xor"])
def test_setp_combines_and_has_two_results(combine):
    x, y = integers("s32", 1), integers("s32", 2)
    p = np.arange(96) % 3 == 0
    inputs = {"x": ("s32", as_array(x, "s32")), "y": ("s32", as_array(y, "s32")), "p": ("pred", p)}
    logic = {"and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b}[
        combine
    ]
    for third, seen in (("%p", p), ("!%p", ~p)):
        out = snippets.run(
            f"setp.lt.{combine}.s32 %d|%e, %x, %y, {third};",
            inputs,
            {"d": "pred", "e": "pred"},
            threads=96,
        )
        assert out["d"].tolist() == [
            logic(a < b, bool(q)) for a, b, q in zip(x, y, seen, strict=True)
        ]
        assert out["e"].tolist() == [
            logic(a >= b, bool(q)) for a, b, q in zip(x, y, seen, strict=True)
        ]


def test_selp_and_guards():
    x, p = np.arange(32, dtype=np.uint32), np.arange(32) % 5 == 0
    inputs = {"x": ("u32", x), "p": ("pred", p)}
    out = snippets.run("selp.b32 %d, %x, 77, %p;", inputs, {"d": "u32"})["d"]
    assert out.tolist() == np.where(p, x, 77).tolist()
    out = snippets.run(
        "mov.u32 %d, 5; @%p add.u32 %d, %d, %x; @!%p mov.u32 %d, 9;", inputs, {"d": "u32"}
    )["d"]
    assert out.tolist() == np.where(p, x + 5, 9).tolist()


def test_mov_packs_and_unpacks():
    a, b = integers("u16", 1), integers("u16", 2)
    inputs = {"x": ("u16", as_array(a, "u16")), "y": ("u16", as_array(b, "u16"))}
    out = snippets.run(
        "mov.b32 %d, {%x, %y}; mov.b32 {%lo, %hi}, %d;",
        inputs,
        {"d": "b32", "lo": "b16", "hi": "b16"},
        threads=96,
    )
    assert out["d"].tolist() == [x | y << 16 for x, y in zip(a, b, strict=True)]
    assert out["lo"].tolist() == a
    assert out["hi"].tolist() == b
