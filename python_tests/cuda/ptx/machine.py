"""The machine: registers as arrays over all threads, program counters, and the schedule.

The threads at the lowest program counter run together, a straight run of instructions at a time, so
that diverged branches meet again. Now and then another group gets its turn, or no spinning thread
would ever see its flag set. A seed makes the schedule wild: random groups run, and random warps
stand still for a while.
"""

import re

import numpy as np

from .counters import classify
from .memory import BadAccess, SharedMemory
from .numbers import TYPES
from .races import Clocks, Race

REGISTER = re.compile(r"%[\w$]+")
COMPILERS = {}  # opcode -> function(instruction, kernel) -> run(machine, mask)
REGISTERS = 65536  # of an SM
WARP_WIDE = set()  # opcodes that all named lanes of a warp execute together


class Trap(Exception):
    """What a device would do wrong, or what this one does not know."""


def opcode(*names, warp_wide=False):
    def register(function):
        for name in names:
            COMPILERS[name] = function
            if warp_wide:
                WARP_WIDE.add(name)
        return function

    return register


def compile_kernel(kernel):
    for ins in kernel.code:
        compiler = COMPILERS.get(ins.op[0])
        if compiler is None:
            raise Trap(f"{ins.where}unknown instruction {ins.name}")
        try:
            ins.run = compiler(ins, kernel)
        except Trap as trap:
            raise Trap(f"{ins.where}{ins.name}: {trap}") from None
        except (KeyError, ValueError, IndexError) as error:
            raise Trap(f"{ins.where}{ins.name}: unknown form ({error!r})") from error
        ins.warp_wide = ins.op[0] in WARP_WIDE
        ins.group_wide = ins.op[:2] == ["wgmma", "mma_async"] or ins.op[0] == "setmaxnreg"
        ins.kind = classify(ins)
    watch_wgmma_registers(kernel)
    kernel.compiled = True


def watch_wgmma_registers(kernel):
    """Marks what else touches the registers of a wgmma: they are its own until it is waited for."""
    products = [ins for ins in kernel.code if ins.op[:2] == ["wgmma", "mma_async"]]
    theirs = {name for ins in products for name in REGISTER.findall(" ".join(ins.operands[:2]))}
    theirs = {name for name in theirs if kernel.registers[name][1].itemsize == 4}
    for ins in kernel.code:
        if theirs and ins.op[0] != "wgmma":
            names = [*REGISTER.findall(" ".join(ins.operands)), ins.guard]
            ins.touches = sorted(theirs.intersection(names))


@opcode("bra", "ret", "exit")
def control(ins, kernel):
    if ins.op[0] == "bra" and ins.operands[0] not in kernel.labels:
        raise Trap("unknown label")
    return None  # the schedule does these itself


class Machine:
    def __init__(
        self, kernel, grid, block, shared_bytes, param_bytes, memory, seed=None, counters=None
    ):
        if not kernel.compiled:
            compile_kernel(kernel)
        self.kernel, self.memory, self.counters = kernel, memory, counters
        per, ctas = int(np.prod(block)), int(np.prod(grid))
        if per % 32 or per > 1024:
            raise Trap(f"a CTA of {per} threads is not a whole number of warps up to 1024 threads")
        if kernel.max_threads and per > kernel.max_threads:
            raise Trap(f"{per} threads per CTA, but __launch_bounds__ says {kernel.max_threads}")
        self.n, self.per, self.ctas = per * ctas, per, ctas
        self.threads = np.arange(self.n)
        self.cta = self.threads // per
        self.special = self._special(grid, block)
        self.registers = [
            np.full(
                self.n,
                0xDEADBEEFDEADBEEF & (1 << 8 * d.itemsize) - 1 if d.kind == "u" else False,
                d,
            )
            for _, d in kernel.registers.values()
        ]
        self.params = np.frombuffer(bytes(param_bytes), np.uint8)
        self.clocks = Clocks(ctas, per)
        static = -(-kernel.shared_bytes // 16) * 16
        self.symbols = dict(kernel.shared) | dict.fromkeys(kernel.dynamic, static)
        self.shared = SharedMemory(ctas, static + shared_bytes, self.clocks)
        memory.begin(self.clocks)
        self.pc = np.zeros(self.n, np.int64)
        self.done = np.zeros(self.n, bool)
        self.held = np.zeros(
            self.n, bool
        )  # at a warp-wide instruction whose other lanes are missing
        self.barrier = np.full(self.n, -1)  # the barrier a thread stands at
        self.for_all = np.zeros(self.n, bool)  # and that is for all threads of the CTA
        self.asks, self.votes = np.zeros((2, self.n), bool)  # it asks whether any of them votes
        self.answers = []  # (where the answer goes, threads that it goes to) of such barriers
        self.copies = {}  # cp.async: see transfer.py
        self.groups = []
        self.mbarriers, self.made = {}, {}  # see mbarrier.py; how many each CTA made
        self.bulk = []  # bulk copies in flight: functions that land them
        self.waiting = np.zeros(self.n, bool)  # at an mbarrier whose phase is not over
        self.flying = {}  # register -> how many wgmma of each thread that use it are in flight
        self.fenced = np.zeros(self.n, bool)  # by wgmma.fence, since a register of a wgmma changed
        self.tensor = {}  # wgmma groups: see wgmma.py
        self.given = np.full(self.n, REGISTERS // per // 8 * 8)  # registers of a thread
        self.rng = np.random.default_rng(0 if seed is None else seed)
        self.wild = seed is not None
        self.frozen = np.zeros(self.n, bool)
        self.turns = 0

    def _special(self, grid, block):
        t, b = self.threads % self.per, self.cta
        values = {"%laneid": t % 32, "%warpid": t // 32}
        for name, index, extent in (("tid", t, block), ("ctaid", b, grid)):
            values[f"%{name}.x"] = index % extent[0]
            values[f"%{name}.y"] = index // extent[0] % extent[1]
            values[f"%{name}.z"] = index // extent[0] // extent[1]
            for axis, size in zip("xyz", extent, strict=True):
                values[f"%n{name}.{axis}"] = np.full(self.n, size)
        one = np.uint32(1)
        lane = (t % 32).astype(np.uint32)
        values["%lanemask_lt"] = (one << lane) - one
        values["%lanemask_le"] = ((one << lane) - one) | one << lane
        values["%lanemask_eq"] = one << lane
        values["%lanemask_gt"] = ~values["%lanemask_le"]
        values["%lanemask_ge"] = ~values["%lanemask_lt"]
        return {k: v.astype(np.uint32) for k, v in values.items()}

    # -- the schedule --

    def _pick(self):
        """The threads that run now: all at one program counter."""
        ready = ~self.done & ~self.held & (self.barrier < 0)
        while self.bulk and (not ready.any() or self.turns % 4 == 0):
            self.bulk.pop(self.rng.integers(len(self.bulk)) if self.wild else 0)()
            ready = ~self.done & ~self.held & (self.barrier < 0)
            if ready.any():
                break
        if not ready.any():
            if self.done.all():
                return None
            if self.waiting.any():
                at = int(self.pc[self.waiting].min())
                raise Trap(f"{self.kernel.code[at].where}deadlock: threads wait at an mbarrier")
            at = int(self.pc[~self.done].min())
            if self.held.any():
                at = int(self.pc[self.held].min())
                ins = self.kernel.code[at]
                raise Trap(f"{ins.where}{ins.name}: reached by only a part of the warp")
            raise Trap(
                f"{self.kernel.code[at - 1].where}deadlock: some threads stand at a barrier, "
                "the others have left"
            )
        self.turns += 1
        if self.wild:
            if self.turns % 16 == 1:
                share = self.rng.choice([0.0, 0.3, 0.8])
                self.frozen = np.repeat(self.rng.random(self.n // 32) < share, 32)
            awake = ready & ~self.frozen
            ready = awake if awake.any() else ready
        if self.turns % 32 == 0 or (self.wild and self.rng.random() < 0.3):
            pc = self.rng.choice(np.unique(self.pc[ready]))
        else:
            pc = self.pc[ready].min()
        return (ready | self.held) & (self.pc == pc), int(pc)

    def run(self):
        code = self.kernel.code
        with np.errstate(all="ignore"):
            while (picked := self._pick()) is not None:
                self._straight(code, *picked)
        if (self.given.reshape(self.ctas, self.per).sum(1) > REGISTERS).any():
            raise Trap("setmaxnreg asks for more registers than the SM has")
        return self

    def _straight(self, code, mask, i):
        """Runs `mask` from instruction i to a branch, a barrier or where others may join."""
        self.held[mask] = False
        alone = int(mask.sum()) == int((~self.done).sum())
        whole = self._whole_warps(mask)
        start = i
        while True:
            if i == len(code):
                self.done |= mask
                return
            ins = code[i]
            if i > start and ((ins.is_target and not alone) or (ins.warp_wide and not whole)):
                self.pc[mask] = i
                return
            if i > start and ins.group_wide and not self._whole_groups(mask):
                self.pc[mask] = i
                return
            active = mask
            if ins.guard:
                active = mask & (self.registers[self.kernel.registers[ins.guard][0]] ^ ins.negate)
            kind = ins.op[0]
            if self.counters:
                self.counters.instruction(ins, active)
            if kind == "bra":
                self.pc[mask] = i + 1
                self.pc[active] = self.kernel.labels[ins.operands[0]]
                return
            if kind in ("ret", "exit"):
                self._leave(active)
                self.pc[mask] = i + 1
                if (active == mask).all():
                    return
                mask = mask & ~active
                whole, alone = self._whole_warps(mask), False
            elif active.any():
                try:
                    self.where = ins
                    if ins.touches:
                        self._registers_are_free(ins, active)
                    waiting = ins.run(self, active)
                except (Trap, BadAccess, Race) as trap:
                    raise Trap(f"{ins.where}{ins.name}: {trap}") from None
                if waiting is not None and waiting.any():  # lanes of incomplete warps stay here
                    self.pc[mask] = i + 1
                    self.pc[waiting] = i
                    self.held |= waiting
                    return
                if kind in ("bar", "barrier"):
                    self.pc[mask] = i + 1
                    return
            i += 1

    def _registers_are_free(self, ins, active):
        self.fenced &= ~active
        for name in ins.touches:
            if name in self.flying and (self.flying[name][active] > 0).any():
                raise Trap(f"{name} belongs to a wgmma in flight")

    def _leave(self, active):
        self.done |= active
        if self.bulk and self.done.all():
            raise Trap("the kernel ends while a bulk copy is in flight")
        # (a barrier for a number of threads may do without these: if not, it is a deadlock)
        standing = (self.barrier >= 0) & self.for_all
        if standing.any() and standing[np.isin(self.cta, self.cta[active])].any():
            raise Trap("a thread exits while others of its CTA stand at a barrier")

    @staticmethod
    def _whole_warps(mask):
        lanes = mask.reshape(-1, 32)
        return bool((lanes.any(1) == lanes.all(1)).all())

    def _whole_groups(self, mask):
        """Warpgroups: four warps that begin at a multiple of four within their CTA."""
        if self.per % 128:
            raise Trap("a CTA of whole warpgroups is wanted")
        lanes = mask.reshape(-1, 128)
        return bool((lanes.any(1) == lanes.all(1)).all())


def read(kernel, text, kind):
    """A function machine -> array (or numpy scalar) of the operand, as PTX type `kind`."""
    dtype = TYPES[kind]
    text = text.strip()
    if text.startswith("!"):
        inner = read(kernel, text[1:], kind)
        return lambda m: ~inner(m)
    if text in kernel.registers:
        index, stored = kernel.registers[text]
        if stored == dtype:
            return lambda m: m.registers[index]
        if stored.itemsize == dtype.itemsize:
            return lambda m: m.registers[index].view(dtype)
        if stored.itemsize < dtype.itemsize:
            raise Trap(f"{text} is narrower than .{kind}")
        # a wider register holds the value in its low bits
        return lambda m: m.registers[index].astype(f"u{dtype.itemsize}").view(dtype)
    if text.startswith("%"):
        return lambda m: m.special[text].astype(dtype)
    if text in kernel.shared or text in kernel.dynamic:
        return lambda m: np.full(m.n, m.symbols[text], dtype)
    if text in kernel.params:
        return lambda m: np.full(m.n, kernel.params[text][0], dtype)
    value = immediate(text, dtype)
    return lambda m: value


def immediate(text, dtype):
    bits = f"u{dtype.itemsize}"
    if text[:2].lower() in ("0f", "0d"):  # the bits of a float or a double
        width = 4 if text[1] in "fF" else 8
        if width != dtype.itemsize:
            raise Trap(f"{text} as a {dtype}")
        return np.array(int(text[2:], 16), f"u{width}").view(dtype)[()]
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "f":
        return dtype.type(value)
    if dtype.kind == "b":
        return np.bool_(value)
    return np.array(value & (1 << 8 * dtype.itemsize) - 1, bits).view(dtype)[()]


def write(kernel, text, kind):
    """A function (machine, value, mask) that puts the value into the register where mask holds."""
    text = text.strip()
    if text == "_":
        return lambda m, value, mask: None
    index, stored = kernel.registers[text]
    dtype = TYPES[kind] if kind else stored

    def put(m, value, mask):
        value = np.asarray(value)
        if value.dtype != dtype:
            raise Trap(f"internal: value of {value.dtype} for .{kind}")
        if stored.itemsize == dtype.itemsize:
            value = value.view(stored) if stored != dtype else value
        elif dtype.kind == "i":  # loads and conversions extend into wider registers
            value = value.astype(f"i{stored.itemsize}").view(stored)
        elif stored.itemsize > dtype.itemsize:
            value = value.astype(stored)
        else:
            raise Trap(f"{text} is narrower than .{kind}")
        np.copyto(m.registers[index], value, where=mask)

    return put
