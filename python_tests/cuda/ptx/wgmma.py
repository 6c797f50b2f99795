"""wgmma: a warpgroup multiplies 64 x 16 by 16 x N numbers of shared memory, asynchronously.

The product is computed when the instruction is met; its registers may not be touched, and what it
reads not be written, until each warp has waited for the group. Sums are truncated, as in mma.
"""

import re

import numpy as np

from .bulk import swizzle
from .machine import REGISTER, Trap, opcode, read, write
from .numbers import bf16_to_f32, f16_to_f32, round_f32
from .tensor import pairs, whole_warps

FORM = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16\.bf16|f16\.f16)")
WIDTHS = (0, 128, 64, 32)  # bytes of a swizzled row, by the descriptor's bits 62 and 63


def chunks(descriptor, extent, mn_major):
    """Byte addresses of the 16-byte chunks that hold a matrix of `extent` x 16 numbers.

    Along K [extent, 2], along M or N [extent / 8, 16]: the chunk's index comes last or first."""
    d = int(descriptor)
    start, leading, stride = ((d >> s & 0x3FFF) << 4 for s in (0, 16, 32))
    width = WIDTHS[d >> 62 & 3]
    if d >> 49 & 7:
        raise Trap("base offset of a matrix descriptor")
    if mn_major:  # blocks of width / 2 numbers by 8 of k
        i, k = np.arange(extent // 8)[:, None], np.arange(16)
        if width:
            per_row = width // 16
            at = i // per_row * leading + i % per_row * 16 + k // 8 * stride + k % 8 * width
        else:
            at = i * stride + k // 8 * leading + k % 8 * 16
    else:  # blocks of 8 rows
        i, k = np.arange(extent)[:, None], np.arange(2)
        if width:
            at = i // 8 * stride + i % 8 * width + k * 16
        else:
            at = i // 8 * stride + i % 8 * 16 + k * leading
    at = start + at
    return swizzle(at, width) if width else at


def matrix(ins, m, descriptor, extent, mn_major, threads, decode):
    """[extent, 16] float32 from shared memory."""
    warps = np.unique(threads % m.per // 32)
    at = chunks(descriptor, extent, mn_major)
    groups = [m.tensor.setdefault(int(t) // 32, Groups()).number for t in threads[::32]]
    data = decode(m.shared.load_multiplied(at, threads, warps, np.array(groups)))
    if m.counters:
        m.counters.matrix(ins, at if not mn_major else at.T)
    return data.swapaxes(1, 2).reshape(extent, 16) if mn_major else data.reshape(extent, 16)


class Groups:
    """wgmma groups of one warp."""

    def __init__(self):
        self.number = 1  # of the open group
        self.registers = {}  # group -> names that its wgmmas use


@opcode("wgmma", warp_wide=True)
def wgmma(ins, kernel):
    what = ins.op[1]
    if what == "mma_async":
        return multiply(ins, kernel)
    if ins.op[2:] != ["sync", "aligned"] or what not in ("fence", "commit_group", "wait_group"):
        raise Trap("form of wgmma")
    keep = int(ins.operands[0]) if what == "wait_group" else None
    act = {"fence": fence, "commit_group": commit, "wait_group": retire}[what]

    def run(m, mask):
        warps, waiting = whole_warps(m, mask)
        for w in warps:
            act(m, int(w), keep)
            m.clocks.meet(np.arange(32 * w, 32 * w + 32))
        return waiting

    return run


@opcode("setmaxnreg", warp_wide=True)
def setmaxnreg(ins, kernel):
    count = int(ins.operands[0])
    if ins.op[2:] != ["sync", "aligned", "u32"] or count % 8 or not 24 <= count <= 256:
        raise Trap("form of setmaxnreg")
    more = {"inc": True, "dec": False}[ins.op[1]]

    def run(m, mask):
        whole = np.repeat(mask.reshape(-1, 128).all(1), 128)
        before = m.given[whole]
        if (before > count if more else before < count).any():
            raise Trap(f"from {before.max()} registers of a thread to {count}")
        m.given[whole] = count
        return mask & ~whole

    return run


def fence(m, warp, _):
    m.fenced[32 * warp : 32 * warp + 32] = True


def commit(m, warp, _):
    m.tensor.setdefault(warp, Groups()).number += 1


def retire(m, warp, keep):
    """All but the newest `keep` committed groups are over."""
    groups = m.tensor.setdefault(warp, Groups())
    lanes = slice(32 * warp, 32 * warp + 32)
    last = groups.number - 1 - keep
    m.clocks.progress[lanes, warp % m.clocks.warps] = max(last, 0)
    for number in [n for n in groups.registers if n <= last]:
        for name in groups.registers.pop(number):
            m.flying[name][lanes] -= 1


def multiply(ins, kernel):
    form = FORM.fullmatch(ins.name)
    if not form or int(form[1]) % 8 or not 8 <= int(form[1]) <= 256:
        raise Trap("form of wgmma")
    columns = int(form[1])
    decode = {"bf16.bf16": bf16_to_f32, "f16.f16": f16_to_f32}[form[2]]
    names = REGISTER.findall(ins.operands[0])
    if len(names) != columns // 2:
        raise Trap("number of registers")
    sums, puts = ([f(kernel, n, "f32") for n in names] for f in (read, write))
    from_registers = ins.operands[1].startswith("{")
    if from_registers:
        mine = REGISTER.findall(ins.operands[1])
        if len(mine) != 4:
            raise Trap("number of registers")
        left, names = [read(kernel, n, "b32") for n in mine], names + mine
    else:
        left = read(kernel, ins.operands[1], "b64")
    right, adds = read(kernel, ins.operands[2], "b64"), read(kernel, ins.operands[3], "pred")
    flags = [int(t) for t in ins.operands[4:]]
    if len(flags) != (3 if from_registers else 4) or set(flags[:2]) - {1, -1}:
        raise Trap("scales and transpositions")
    sign = flags[0] * flags[1]
    left_mn, right_mn = (False, *flags[2:])[-2:]

    def run(m, mask):
        groups = mask.reshape(-1, 128)
        whole = np.repeat(groups.all(1), 128)
        if (np.repeat(m.done.reshape(-1, 128).any(1), 128) & mask).any():
            raise Trap("a thread of the warpgroup has exited")
        for g in np.flatnonzero(groups.all(1)):
            one_group(m, np.arange(128 * g, 128 * g + 128))
        return mask & ~whole

    def same(m, value, threads):
        value = np.broadcast_to(value(m), m.n)[threads]
        if (value != value[0]).any():
            raise Trap("threads of a warpgroup differ")
        return value[0]

    def one_group(m, threads):
        if not m.fenced[threads].all():
            raise Trap("no wgmma.fence since its registers were last touched")
        B = matrix(ins, m, same(m, right, threads), columns, right_mn, threads, decode)
        if from_registers:
            A = fragments([r(m)[threads] for r in left], pairs(decode))
        else:
            A = matrix(ins, m, same(m, left, threads), 64, left_mn, threads, decode)
        C = np.zeros((4, 2, 8, columns // 8, 4, 2))  # warp, half, row, block, quad, number
        if same(m, adds, threads):
            for i, r in enumerate(sums):
                C[:, i // 2 % 2, :, i // 4, :, i % 2] = r(m)[threads].reshape(4, 8, 4)
        with np.errstate(invalid="ignore"):
            D = A.astype(np.float64) @ B.T.astype(np.float64) * sign + C.reshape(64, columns)
        D = round_f32(D, "rz").reshape(C.shape)
        mask = np.zeros(m.n, bool)
        mask[threads] = True
        for i, put in enumerate(puts):
            out = np.zeros(m.n, np.float32)
            out[threads] = D[:, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1)
            put(m, out, mask)
        for name in names:
            m.flying.setdefault(name, np.zeros(m.n, np.int32))[threads] += 1
        for warp in threads[::32] // 32:
            open_group = m.tensor.setdefault(int(warp), Groups())
            open_group.registers.setdefault(open_group.number, []).extend(names)
        if m.counters:
            m.counters.products += 4 * columns // 8

    return run


def fragments(registers, block):
    """A from registers: each warp has 16 rows, laid out as in mma.m16n8k16."""
    A = np.empty((4, 16, 16), np.float32)
    for i, r in enumerate(registers):
        A[:, i % 2 * 8 : i % 2 * 8 + 8, i // 2 * 8 : i // 2 * 8 + 8] = block(r.reshape(4, 32))
    return A.reshape(64, 16)
