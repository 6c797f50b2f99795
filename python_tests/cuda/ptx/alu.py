"""Arithmetic, logic and comparison opcodes. Whatever form is not written here is a Trap at compile
time."""

import numpy as np

from .machine import Trap, opcode, read, write
from .numbers import TYPES, flush, fma_exact, fma_f32, perturb, round_f32

SIGNED_OR_BITS = ("s16", "u16", "b16", "s32", "u32", "b32", "s64", "u64", "b64")


def only(ins, *allowed):
    """Modifiers between the opcode and its type must be known ones."""
    for part in ins.op[1:-1]:
        if part not in allowed:
            raise Trap(f"modifier .{part}")


def lanewise(ins, kernel, function, kind=None, result=None):
    kind = kind or ins.op[-1]
    sources = [read(kernel, text, kind) for text in ins.operands[1:]]
    put = write(kernel, ins.operands[0], result or kind)
    dtype = TYPES[result or kind]

    def run(m, mask):
        put(m, np.asarray(function(*(s(m) for s in sources))).astype(dtype, copy=False), mask)

    return run


def is_float(kind):
    return kind in ("f32", "f64")


def flushed(ins, function):
    """.ftz: subnormal inputs and results become zeros of their sign."""
    if "ftz" not in ins.op:
        return function
    return lambda *xs: flush(np.asarray(function(*(flush(x) for x in xs)), np.float32))


@opcode("add", "sub")
def add_sub(ins, kernel):
    only(ins, "rn", "ftz")
    function = np.add if ins.op[0] == "add" else np.subtract
    return lanewise(ins, kernel, flushed(ins, function))


@opcode("mul")
def mul(ins, kernel):
    kind = ins.op[-1]
    if is_float(kind):
        only(ins, "rn", "ftz")
        return lanewise(ins, kernel, flushed(ins, np.multiply))
    only(ins, "lo", "hi", "wide")
    product, result = integer_product(ins.op[1], kind)
    return lanewise(ins, kernel, product, result=result)


def integer_product(part, kind):
    """(function, result type) of mul.lo, .hi and .wide."""
    bits = TYPES[kind].itemsize * 8
    if part == "lo":
        return np.multiply, kind
    if bits == 64:  # hi: in Python's integers

        def high(x, y):
            x, y = np.broadcast_arrays(x, y)
            return np.array(
                [int(a) * int(b) >> 64 for a, b in zip(x.ravel(), y.ravel(), strict=True)],
                TYPES[kind],
            ).reshape(x.shape)

        return high, kind
    wide = f"{kind[0]}{bits * 2}"
    dtype = TYPES[wide]
    if part == "wide":
        return (lambda x, y: x.astype(dtype) * y.astype(dtype)), wide
    return (lambda x, y: x.astype(dtype) * y.astype(dtype) >> dtype.type(bits)), kind


@opcode("mad")
def mad(ins, kernel):
    only(ins, "lo", "hi", "wide")
    product, result = integer_product(ins.op[1], ins.op[-1])
    sources = [read(kernel, ins.operands[i], ins.op[-1]) for i in (1, 2)] + [
        read(kernel, ins.operands[3], result)
    ]
    put = write(kernel, ins.operands[0], result)

    def run(m, mask):
        x, y, z = (s(m) for s in sources)
        put(m, np.asarray(product(x, y)).astype(TYPES[result]) + z, mask)

    return run


@opcode("fma")
def fma(ins, kernel):
    only(ins, "rn", "rz", "rm", "rp", "ftz")
    if ins.op[-1] != "f32":
        raise Trap("fma other than f32")
    if ins.op[1] == "rn":
        return lanewise(ins, kernel, flushed(ins, fma_f32))
    return lanewise(ins, kernel, flushed(ins, lambda *xs: round_f32(fma_exact(*xs), ins.op[1])))


@opcode("div")
def div(ins, kernel):
    kind = ins.op[-1]
    if is_float(kind):
        only(ins, "rn", "full", "approx", "ftz")
        if "approx" in ins.op or "full" in ins.op:  # 2 ulp
            return lanewise(
                ins, kernel, flushed(ins, lambda x, y: perturb(x.astype(np.float64) / y, 2.0**-22))
            )
        return lanewise(ins, kernel, flushed(ins, np.divide))
    only(ins)
    return lanewise(ins, kernel, truncated_quotient)


def truncated_quotient(x, y):
    """PTX integer division: toward zero; by zero it gives all ones, as the device does."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    q = x // safe
    if x.dtype.kind == "i":
        q = q + ((q * safe != x) & ((x < 0) != (safe < 0)))
    return np.where(y == 0, np.array(-1).astype(x.dtype), q).astype(x.dtype)


@opcode("rem")
def rem(ins, kernel):
    only(ins)
    return lanewise(ins, kernel, lambda x, y: np.where(y == 0, x, x - truncated_quotient(x, y) * y))


@opcode("min", "max")
def min_max(ins, kernel):
    only(ins, "ftz")
    floats = is_float(ins.op[-1])
    table = {"min": np.fmin if floats else np.minimum, "max": np.fmax if floats else np.maximum}
    return lanewise(ins, kernel, flushed(ins, table[ins.op[0]]))


@opcode("neg", "abs")
def neg_abs(ins, kernel):
    only(ins, "ftz")
    return lanewise(ins, kernel, flushed(ins, np.negative if ins.op[0] == "neg" else np.abs))


@opcode("and", "or", "xor", "not")
def logic(ins, kernel):
    only(ins)
    table = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    return lanewise(ins, kernel, table[ins.op[0]])


@opcode("lop3")
def lop3(ins, kernel):
    table = int(ins.operands[4], 0)

    def function(a, b, c):
        out = np.zeros_like(a | b | c)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    ins.operands = ins.operands[:4]
    return lanewise(ins, kernel, function)


@opcode("shl", "shr")
def shift(ins, kernel):
    kind = ins.op[-1]
    value, amount = read(kernel, ins.operands[1], kind), read(kernel, ins.operands[2], "u32")
    put = write(kernel, ins.operands[0], kind)
    bits = TYPES[kind].itemsize * 8

    def run(m, mask):  # amounts beyond the width clamp to it
        x, s = value(m), np.asarray(amount(m))
        small = np.minimum(s, bits - 1).astype(TYPES[kind])
        y = x << small if ins.op[0] == "shl" else x >> small
        if ins.op[0] == "shl" or kind[0] != "s":
            y = np.where(s < bits, y, TYPES[kind].type(0))
        put(m, np.asarray(y).astype(TYPES[kind], copy=False), mask)

    return run


@opcode("shf")
def funnel_shift(ins, kernel):
    left, wrap = ins.op[1] == "l", ins.op[2] == "wrap"
    low, high, amount = (read(kernel, t, "u32") for t in ins.operands[1:])
    put = write(kernel, ins.operands[0], "b32")

    def run(m, mask):
        both = high(m).astype(np.uint64) << np.uint64(32) | low(m).astype(np.uint64)
        s = np.asarray(amount(m)).astype(np.uint64)
        s = s & np.uint64(31) if wrap else np.minimum(s, np.uint64(32))
        y = both << s >> np.uint64(32) if left else both >> s
        put(m, np.asarray(y).astype(np.uint32), mask)

    return run


@opcode("popc", "clz", "brev", "bfind")
def bits_of(ins, kernel):
    kind = ins.op[-1]
    width = TYPES[kind].itemsize * 8

    def as_bits(x):  # [n, width], most significant first
        x = np.asarray(x).view(f"u{width // 8}")
        return (
            x[..., None] >> np.arange(width - 1, -1, -1, dtype=x.dtype) & x.dtype.type(1)
        ).astype(bool)

    def leading_zeros(x):
        b = as_bits(x)
        return np.where(b.any(-1), b.argmax(-1), width)

    if ins.op[0] == "popc":
        return lanewise(ins, kernel, lambda x: as_bits(x).sum(-1), result="u32")
    if ins.op[0] == "clz":
        return lanewise(ins, kernel, leading_zeros, result="u32")
    if ins.op[0] == "bfind":
        if kind[0] == "s":
            raise Trap("signed bfind")
        if "shiftamt" in ins.op:
            return lanewise(
                ins, kernel, lambda x: np.where(x == 0, 0xFFFFFFFF, leading_zeros(x)), result="u32"
            )
        return lanewise(
            ins, kernel, lambda x: (width - 1 - leading_zeros(x)) & 0xFFFFFFFF, result="u32"
        )
    powers = np.uint64(1) << np.arange(width, dtype=np.uint64)
    return lanewise(ins, kernel, lambda x: (as_bits(x) * powers).sum(-1, dtype=np.uint64))


@opcode("bfe")
def bit_field_extract(ins, kernel):
    if ins.op[-1] != "u32":
        raise Trap("bfe other than u32")
    return lanewise(
        ins,
        kernel,
        lambda x, at, n: (
            (x.astype(np.uint64) >> np.minimum(at & 255, 63).astype(np.uint64))
            & ((np.uint64(1) << np.minimum(n & 255, 63).astype(np.uint64)) - np.uint64(1))
        ),
    )


@opcode("bfi")
def bit_field_insert(ins, kernel):
    kind = ins.op[-1]
    value, base = (read(kernel, t, kind) for t in ins.operands[1:3])
    at, count = (read(kernel, t, "u32") for t in ins.operands[3:])
    put = write(kernel, ins.operands[0], kind)

    def ones(n):  # the n lowest bits
        below = (np.uint64(1) << np.minimum(n, 63)) - np.uint64(1)
        return np.where(n < 64, below, ~np.uint64(0))

    def run(m, mask):
        x, old = (np.asarray(v(m)).astype(np.uint64) for v in (value, base))
        first, n = ((np.asarray(v(m)) & 255).astype(np.uint64) for v in (at, count))
        field = ones(first + n) & ~ones(first)
        new = old & ~field | x << np.minimum(first, 63) & field
        put(m, new.astype(TYPES[kind]), mask)  # which cuts what lies beyond 32 bits

    return run


@opcode("prmt")
def permute_bytes(ins, kernel):
    if len(ins.op) != 2:
        raise Trap("prmt mode")
    a, b, select = (read(kernel, t, "u32") for t in ins.operands[1:])
    put = write(kernel, ins.operands[0], "b32")

    def run(m, mask):
        both = b(m).astype(np.uint64) << np.uint64(32) | a(m).astype(np.uint64)
        out = np.uint64(0)
        for i in range(4):
            nibble = (np.asarray(select(m)) >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            out = out | np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        put(m, np.asarray(out).astype(np.uint32), mask)

    return run


@opcode("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh")
def transcendental(ins, kernel):
    if ins.op[-1] != "f32" or not ({"approx", "rn"} & set(ins.op)):
        raise Trap("form of a transcendental")
    only(ins, "approx", "ftz", "rn")
    functions = {
        "ex2": np.exp2,
        "lg2": np.log2,
        "rcp": lambda x: 1 / x,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "tanh": np.tanh,
    }
    # largest relative errors in the PTX manual: 2 ulp of ex2, 1 ulp of rcp, 2^-23 sqrt, 2^-22.9
    # rsqrt, 2^-11 tanh
    error = {
        "ex2": 2.0**-22,
        "lg2": 2.0**-22,
        "rcp": 2.0**-23,
        "sqrt": 2.0**-23,
        "rsqrt": 2.0**-22.9,
        "tanh": 2.0**-11,
    }
    name, exact = ins.op[0], functions[ins.op[0]]
    if "rn" in ins.op:
        return lanewise(
            ins, kernel, flushed(ins, lambda x: exact(x.astype(np.float64)).astype(np.float32))
        )
    return lanewise(
        ins, kernel, flushed(ins, lambda x: perturb(exact(np.asarray(x, np.float64)), error[name]))
    )


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(name, floats):
    if not floats:
        return COMPARE[UNSIGNED.get(name, name)]

    def unordered(x, y):
        return np.isnan(x) | np.isnan(y)

    if name == "nan":
        return unordered
    if name == "num":
        return lambda x, y: ~unordered(x, y)
    if name.endswith("u") and name[:-1] in COMPARE:
        return lambda x, y: COMPARE[name[:-1]](x, y) | unordered(x, y)
    return lambda x, y: COMPARE[name](x, y) & ~unordered(x, y)


@opcode("setp")
def setp(ins, kernel):
    kind, combine = ins.op[-1], ins.op[2] if ins.op[2] in ("and", "or", "xor") else None
    compare = comparison(ins.op[1], is_float(kind))
    x, y = (read(kernel, t, kind) for t in ins.operands[1:3])
    p, _, q = ins.operands[0].partition("|")
    put_p, put_q = write(kernel, p, "pred"), write(kernel, q or "_", "pred")
    logical = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    other = read(kernel, ins.operands[3], "pred") if combine else None

    def run(m, mask):
        yes = np.asarray(compare(x(m), y(m)))
        no = ~yes
        if combine:
            yes, no = (logical[combine](v, other(m)) for v in (yes, no))
        put_p(m, yes, mask)
        put_q(m, no, mask)

    return run


@opcode("selp")
def selp(ins, kernel):
    kind = ins.op[-1]
    x, y = (read(kernel, t, kind) for t in ins.operands[1:3])
    which, put = read(kernel, ins.operands[3], "pred"), write(kernel, ins.operands[0], kind)
    return lambda m, mask: put(m, np.where(which(m), x(m), y(m)), mask)
