"""cvt, mov: between number formats, and between wide registers and narrow ones."""

import numpy as np

from .alu import is_float, lanewise
from .machine import Trap, opcode, read, write
from .numbers import DECODE, ENCODE, TYPES, f32_to_finite_f16, f32_to_tf32


@opcode("mov")
def mov(ins, kernel):
    kind = ins.op[-1]
    source, target = ins.operands[1], ins.operands[0]
    if source.startswith("{"):  # pack narrow registers into a wide one, the first lowest
        parts = source.strip("{} ").split(",")
        narrow = f"b{TYPES[kind].itemsize * 8 // len(parts)}"
        reads, put = [read(kernel, p, narrow) for p in parts], write(kernel, target, kind)
        bits, dtype = TYPES[narrow].itemsize * 8, TYPES[kind]

        def pack(m, mask):
            value = np.zeros(m.n, dtype)
            for i, r in enumerate(reads):
                value |= np.asarray(r(m)).astype(dtype) << dtype.type(bits * i)
            put(m, value, mask)

        return pack
    if target.startswith("{"):
        parts = target.strip("{} ").split(",")
        narrow = f"b{TYPES[kind].itemsize * 8 // len(parts)}"
        puts, value = [write(kernel, p, narrow) for p in parts], read(kernel, source, kind)
        bits = TYPES[narrow].itemsize * 8

        def unpack(m, mask):
            for i, put in enumerate(puts):
                put(m, (value(m) >> TYPES[kind].type(bits * i)).astype(TYPES[narrow]), mask)

        return unpack
    return lanewise(ins, kernel, lambda x: x)


@opcode("cvt")
def cvt(ins, kernel):
    to, come = ins.op[-2], ins.op[-1]
    mods = set(ins.op[1:-2])
    finite = to == "f16x2" and mods == {"rn", "satfinite"}
    if to in ("bf16x2", "f16x2") and come == "f32" and (finite or mods == {"rn"}):
        high, low = (read(kernel, t, "f32") for t in ins.operands[1:])
        put = write(kernel, ins.operands[0], "b32")
        encode = f32_to_finite_f16 if finite else ENCODE[to[:-2]]

        def run(m, mask):
            hi, lo = (np.broadcast_to(encode(r(m)), m.n).astype(np.uint32) for r in (high, low))
            put(m, hi << np.uint32(16) | lo, mask)

        return run
    if to in ENCODE and come == "f32" and mods == {"rn"}:
        return convert(ins, kernel, "f32", "b16", ENCODE[to])
    if to == "f32" and come in DECODE and not mods:
        return convert(ins, kernel, "b16", "f32", DECODE[come])
    if to == "tf32" and come == "f32" and mods == {"rna"}:
        return convert(ins, kernel, "f32", "b32", f32_to_tf32)
    if not all(is_float(k) or k[0] in "us" for k in (to, come)):
        raise Trap("conversion")
    if is_float(come) and not is_float(to):
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        (mode,) = mods - {"ftz"}
        to_integer, info = rounding[mode], np.iinfo(TYPES[to])

        def saturate(x):  # NaN gives 0, out of range the nearest end
            y = np.nan_to_num(
                to_integer(np.asarray(x, np.float64)), nan=0.0, posinf=1e30, neginf=-1e30
            )
            whole = [min(max(int(v), info.min), info.max) for v in np.atleast_1d(y)]
            return np.array(whole, TYPES[to])

        return convert(ins, kernel, come, to, saturate)
    if is_float(to) and not is_float(come):
        if mods != {"rn"}:
            raise Trap("rounding of an integer")
        return convert(ins, kernel, come, to, lambda x: x.astype(TYPES[to]))
    if is_float(to) and is_float(come):
        if mods == {"sat"} and to == come:  # to [0, 1], NaN to 0
            return convert(ins, kernel, come, to, lambda x: np.fmin(np.fmax(x, 0), 1))
        if mods - {"rn", "ftz"}:
            raise Trap("rounding of a float")
        return convert(ins, kernel, come, to, lambda x: x.astype(TYPES[to]))
    if mods:
        raise Trap("modifiers of an integer conversion")
    return convert(ins, kernel, come, to, lambda x: x.astype(TYPES[to]))


def convert(ins, kernel, come, to, function):
    value, put = read(kernel, ins.operands[1], come), write(kernel, ins.operands[0], to)
    return lambda m, mask: put(m, np.asarray(function(value(m))), mask)
