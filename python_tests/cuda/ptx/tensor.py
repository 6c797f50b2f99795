"""ldmatrix and mma.sync. Sums of mma are truncated to float32, as tensor cores do, not rounded."""

import re

import numpy as np

from .machine import Trap, opcode, read, write
from .numbers import bf16_to_f32, f16_to_f32, round_f32
from .transfer import address_of

# An operand as (rows, columns) and, per register, which 8x(8 or 4) block it holds. See the PTX
# manual's fragment figures: lane l holds row l / 4; of 16-bit types columns 2 (l % 4) and one more,
# of 32-bit types column l % 4.


def registers(text):
    return re.findall(r"%\w+|0[fF][0-9a-fA-F]{8}|-?\d+", text)


def whole_warps(m, mask):
    """(indices of the complete warps, lanes that wait for their warp)."""
    lanes = mask.reshape(-1, 32)
    full = lanes.all(1)
    waiting = mask & ~np.repeat(full, 32)
    if (waiting & np.repeat(m.done.reshape(-1, 32).any(1), 32)).any():
        raise Trap("a lane of the warp has exited")
    return np.flatnonzero(full), waiting


@opcode("ldmatrix", warp_wide=True)
def ldmatrix(ins, kernel):
    name = ins.name.replace("shared::cta", "shared")
    match = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", name)
    if not match:
        raise Trap("form of ldmatrix")
    count, transposed = int(match[1]), bool(match[2])
    puts = [write(kernel, r, "b32") for r in registers(ins.operands[0])]
    address = address_of(kernel, ins.operands[1], "shared")

    def run(m, mask):
        warps, waiting = whole_warps(m, mask)
        if not len(warps):
            return waiting
        # lanes 0 .. 8 count - 1 give the row addresses
        threads = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        a = address(m)[threads]
        if m.counters:
            m.counters.matrix_rows(ins, m, threads, a)
        rows = m.shared.load(a, 16, threads).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            rows = rows.swapaxes(2, 3)
        values = np.ascontiguousarray(rows).view(np.uint32).reshape(len(warps), count, 32)
        full = np.zeros(m.n, bool)
        full.reshape(-1, 32)[warps] = True
        for i, put in enumerate(puts):
            out = np.zeros((m.n // 32, 32), np.uint32)
            out[warps] = values[:, i]
            put(m, out.reshape(-1), full)
        return waiting

    return run


def pairs(decode):
    """[w, 32] uint32 registers -> [w, 8, 8] block of float32: two 16-bit numbers per lane."""

    def block(r):
        both = np.stack([r & np.uint32(0xFFFF), r >> np.uint32(16)], -1).astype(np.uint16)
        return decode(both).reshape(-1, 8, 8)

    return block


def singles(r):
    """[w, 32] uint32 registers of tf32 -> [w, 8, 4]; the low 13 bits are ignored."""
    return (r & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 8, 4)


FORMS = {  # shape and types -> (K, decoder of a register, columns per register)
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, pairs(bf16_to_f32), 8),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, pairs(f16_to_f32), 8),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (8, singles, 4),
}


@opcode("mma", warp_wide=True)
def mma(ins, kernel):
    prefix = "mma.sync.aligned."
    if not ins.name.startswith(prefix) or ins.name[len(prefix) :] not in FORMS:
        raise Trap("form of mma")
    depth, decode, columns = FORMS[ins.name[len(prefix) :]]
    puts = [write(kernel, r, "f32") for r in registers(ins.operands[0])]
    a, b = ([read(kernel, r, "b32") for r in registers(t)] for t in ins.operands[1:3])
    c = [read(kernel, r, "f32") for r in registers(ins.operands[3])]
    if (len(puts), len(a), len(b), len(c)) != (4, 4, 2, 4):
        raise Trap("number of registers")

    def run(m, mask):
        warps, waiting = whole_warps(m, mask)
        if not len(warps):
            return waiting

        def block(r, how):
            return how(np.ascontiguousarray(np.broadcast_to(r(m), m.n).reshape(-1, 32)[warps]))

        A = np.empty((len(warps), 16, depth), np.float64)
        B = np.empty((len(warps), depth, 8), np.float64)
        C = np.empty((len(warps), 16, 8), np.float64)
        for i, r in enumerate(a):  # rows 0-7, rows 8-15, then the same with the later columns
            A[:, i % 2 * 8 : i % 2 * 8 + 8, i // 2 * columns : (i // 2 + 1) * columns] = block(
                r, decode
            )
        for i, r in enumerate(b):
            B[:, i * columns : (i + 1) * columns] = block(r, decode).swapaxes(1, 2)
        quads = C.reshape(-1, 2, 8, 4, 2)
        for i, r in enumerate(c):
            quads[:, i // 2, :, :, i % 2] = block(r, lambda v: v.reshape(-1, 8, 4))
        D = round_f32(A @ B + C, "rz").reshape(-1, 2, 8, 4, 2)
        full = np.zeros(m.n, bool)
        full.reshape(-1, 32)[warps] = True
        for i, put in enumerate(puts):
            out = np.zeros((m.n // 32, 32), np.float32)
            out[warps] = D[:, i // 2, :, :, i % 2].reshape(-1, 32)
            put(m, out.reshape(-1), full)
        return waiting

    return run
