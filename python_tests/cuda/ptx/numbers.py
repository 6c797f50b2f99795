"""PTX number types as numpy arrays, and the roundings numpy does not have."""

import numpy as np

# PTX type -> numpy type of a value. bf16 and f16 travel as their 16 bits (b16) until an opcode
# decodes them.
TYPES = {"pred": np.dtype(np.bool_), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
for _bits in (8, 16, 32, 64):
    TYPES[f"s{_bits}"] = np.dtype(f"i{_bits // 8}")
    TYPES[f"u{_bits}"] = TYPES[f"b{_bits}"] = np.dtype(f"u{_bits // 8}")
for _name in ("f16", "bf16"):
    TYPES[_name] = TYPES["b16"]
for _name in ("f16x2", "bf16x2", "tf32"):
    TYPES[_name] = TYPES["b32"]
TYPES["b128"] = np.dtype("V16")


def bf16_to_f32(bits):
    """uint16 -> float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    """float32 -> uint16, to nearest even; NaN becomes the canonical 0x7fff."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + (u >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f16_to_f32(bits):
    """uint16 -> float32, exact."""
    return bits.view(np.float16).astype(np.float32)


def f32_to_f16(x):
    """float32 -> uint16, to nearest even; NaN becomes the canonical 0x7fff."""
    bits = np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits).astype(np.uint16)


def f32_to_tf32(x):
    """float32 -> float32 bits with 10 mantissa bits: nearest, ties away from zero (cvt.rna)."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (u + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, u)


def f32_to_finite_f16(x):
    """The same, but beyond the largest number that number (.satfinite)."""
    bits = f32_to_f16(x)
    return np.where(bits & 0x7FFF == 0x7C00, bits - np.uint16(1), bits)


DECODE = {"bf16": bf16_to_f32, "f16": f16_to_f32}
ENCODE = {"bf16": f32_to_bf16, "f16": f32_to_f16}


def fma_exact(x, y, z):
    """x·y + z as a float64 rounded to odd, so that a second rounding, to float32, is the right one.
    The product is exact in float64."""
    p = x.astype(np.float64) * y
    c = np.asarray(z, np.float64)
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)  # Knuth's two-sum: s + error == p + c exactly
    bits = np.ascontiguousarray(s).view(np.int64)
    inexact = np.isfinite(s) & (error != 0) & (bits & 1 == 0)
    towards = np.where((error > 0) == (s > 0), 1, -1)
    return np.where(inexact, bits + towards, bits).view(np.float64)


def fma_f32(x, y, z):
    """x·y + z to nearest even. The float64 sum rounds the same way as the exact one unless it lies
    halfway between two float32, or among the subnormal ones: only then the long way is needed."""
    s = x.astype(np.float64) * y + z
    halfway = np.ascontiguousarray(s).view(np.int64) & 0x1FFFFFFF == 0x10000000
    if (halfway | (np.abs(s) < 2.0**-126) & (s != 0)).any():
        return fma_exact(x, y, z).astype(np.float32)
    return s.astype(np.float32)


def round_f32(x, mode):
    """float64 -> float32: rn to nearest even, rz toward zero, rm down, rp up."""
    r = np.asarray(x).astype(np.float32)
    if mode == "rn":
        return r
    wide = r.astype(np.float64)
    too_far = {"rz": np.abs(wide) > np.abs(x), "rm": wide > x, "rp": wide < x}[mode]
    goal = np.float32({"rz": 0, "rm": -np.inf, "rp": np.inf}[mode])
    return np.where(too_far, np.nextafter(r, goal), r)


def perturb(x, relative):
    """x (float64) as a float32 that is off by up to the given relative error, a different amount
    for each value: the approximate instructions may do that, so kernels must live with it."""
    bits = np.ascontiguousarray(x).view(np.uint64)
    hashed = (bits ^ (bits >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15)
    unit = (hashed >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0  # in [-1, 1)
    # the rounding to float32 itself takes up to 2^-24 of the allowance
    return (x * (1.0 + unit * (relative - 2.0**-24))).astype(np.float32)


def flush(x):
    """fp32 whose subnormals are zeros of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)
