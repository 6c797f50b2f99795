"""mbarriers: they count arrivals and the bytes of bulk copies, phase by phase.

An arrival releases what its thread knows to those who see the phase end. A thread that waits for a
phase stands still until something happens at its CTA; under a wild schedule it sometimes gets the
`false` that try_wait may always give.

Parity tells a phase from the next, not from the one after: whoever waits for a phase must have seen
its end before the next phase ends. A wait that is not ordered before that is a trap, whether or not
this run missed the phase.
"""

import numpy as np

from .machine import Trap, opcode, read, write
from .races import MBARRIERS
from .transfer import address_of

LIMIT = 1 << 20  # of arrivals and of bytes


class Mbarrier:
    def __init__(self, number, agent, count, maker):
        self.number = number  # of the CTA
        self.agent = agent  # its column in Clocks.progress
        self.count = self.pending = count
        self.bytes, self.phase = 0, 0
        self.maker = maker  # the thread that made it, until the asynchronous proxy may know it
        self.gathered = self.message = None  # knowledge of this phase's arrivals; of past phases'
        self.looked = {}  # thread -> its clock when it saw the end of the phase before

    def expect(self, m, number):
        self._add(number)
        self._step(m)

    def arrive(self, m, threads, count, bytes_too=0):
        self._add(bytes_too)  # first, or the phase might end without the bytes
        if self.pending < count:
            raise Trap(f"more arrivals at an mbarrier than its {self.count}")
        self.gathered = merge(self.gathered, m.clocks.release(threads))
        self.pending -= count
        self._step(m)

    def _add(self, number):
        self.bytes += number
        if abs(self.bytes) >= LIMIT:
            raise Trap(f"{self.bytes} bytes expected at an mbarrier")

    def _step(self, m):
        if self.pending or self.bytes:
            return
        known, _, _, passed = self.gathered
        known = known if passed is None else np.maximum(known, passed)
        if any(known[t % m.per] < clock for t, clock in self.looked.items()):
            raise Trap("a phase ends, and a thread may still be waiting for the one before")
        self.looked.clear()
        self.phase += 1
        self.pending = self.count
        self.message = merge(self.message, self.gathered)
        self.gathered = None
        here = m.waiting & (m.cta == self.number)
        m.waiting &= ~here
        m.held &= ~here

    def learn(self, m, threads):
        m.clocks.acquire(threads, self.message)
        m.clocks.progress[threads, self.agent] = self.phase


def merge(a, b):
    if a is None or b is None:
        return b if a is None else a
    return tuple(
        np.maximum(x, y) if x is not None and y is not None else y if x is None else x
        for x, y in zip(a, b, strict=True)
    )


def find(m, cta, address):
    found = m.mbarriers.get((int(cta), int(address)))
    if found is None:
        raise Trap(f"no mbarrier at byte {int(address)}")
    return found


def grouped(m, mask, addresses):
    """[(mbarrier, its threads)] of the active threads, which must know that it was made."""
    threads = m.threads[mask]
    a = addresses[mask].astype(np.int64)
    if (a % 8).any():
        raise Trap("misaligned mbarrier")
    keys = np.stack([m.cta[mask], a], 1)
    out = []
    for cta, address in np.unique(keys, axis=0):
        who = threads[(keys == (cta, address)).all(1)]
        found = find(m, cta, address)
        m.shared.load(np.full(len(who), address), 8, who, atomic=True)
        out.append((found, who))
    return out


@opcode("mbarrier")
def mbarrier(ins, kernel):
    form = [p for p in ins.op[1:] if p not in ("shared", "b64", "cta", "release", "acquire")]
    if "shared" not in ins.op or ins.op[-1] != "b64":
        raise Trap("space or type of mbarrier")
    make = {
        ("init",): init,
        ("inval",): inval,
        ("arrive",): arrive,
        ("arrive", "expect_tx"): arrive,
        ("expect_tx", "relaxed"): expect,
        ("try_wait", "parity"): wait,
        ("test_wait", "parity"): wait,
    }.get(tuple(form))
    if make is None:
        raise Trap("form of mbarrier")
    return make(ins, kernel)


def init(ins, kernel):
    address = address_of(kernel, ins.operands[0], "shared")
    count = read(kernel, ins.operands[1], "u32")

    def run(m, mask):
        for t in m.threads[mask]:
            where, n = address(m)[t : t + 1], int(np.broadcast_to(count(m), m.n)[t])
            cta = int(m.cta[t])
            if not 0 < n < LIMIT:
                raise Trap(f"an mbarrier for {n} arrivals")
            key = cta, int(where[0])
            if key in m.mbarriers:
                raise Trap("an mbarrier is made where one is")
            agent = m.clocks.warps + m.made.get(cta, 0)
            m.made[cta] = m.made.get(cta, 0) + 1
            if m.made[cta] > MBARRIERS:
                raise Trap(f"more than {MBARRIERS} mbarriers")
            m.shared.store(where, np.zeros((1, 8), np.uint8), np.array([t]))
            m.mbarriers[key] = Mbarrier(cta, agent, n, int(t))

    return run


def inval(ins, kernel):
    address = address_of(kernel, ins.operands[0], "shared")

    def run(m, mask):
        for t in m.threads[mask]:
            where = address(m)[t : t + 1]
            find(m, m.cta[t], where[0])
            m.shared.store(where, np.zeros((1, 8), np.uint8), np.array([t]))
            del m.mbarriers[int(m.cta[t]), int(where[0])]

    return run


def arrive(ins, kernel):
    if ins.operands[0] != "_":
        raise Trap("the state that arrive returns")
    address = address_of(kernel, ins.operands[1], "shared")
    number = read(kernel, ins.operands[2] if len(ins.operands) > 2 else "1", "u32")
    expects = "expect_tx" in ins.op

    def run(m, mask):
        for barrier, threads in grouped(m, mask, address(m)):
            total = int(np.broadcast_to(number(m), m.n)[threads].sum(dtype=np.int64))
            if expects:
                barrier.arrive(m, threads, len(threads), total)
            else:
                barrier.arrive(m, threads, total)

    return run


def expect(ins, kernel):
    address = address_of(kernel, ins.operands[0], "shared")
    number = read(kernel, ins.operands[1], "u32")

    def run(m, mask):
        for barrier, threads in grouped(m, mask, address(m)):
            barrier.expect(m, int(np.broadcast_to(number(m), m.n)[threads].sum()))

    return run


def wait(ins, kernel):
    put = write(kernel, ins.operands[0], "pred")
    address = address_of(kernel, ins.operands[1], "shared")
    parity = read(kernel, ins.operands[2], "u32")
    tries = ins.op[1] == "try_wait"

    def run(m, mask):
        over, stand = np.zeros(m.n, bool), np.zeros(m.n, bool)
        for barrier, threads in grouped(m, mask, address(m)):
            wanted = np.broadcast_to(parity(m), m.n)[threads]
            if (wanted > 1).any():
                raise Trap("parity of an mbarrier's phase is 0 or 1")
            done = wanted != barrier.phase % 2
            if done.any() and barrier.message is not None:  # none: the phase before the first
                barrier.learn(m, threads[done])
            barrier.looked.update((int(t), m.clocks.clock[t]) for t in threads[done])
            over[threads] = done
            gives_up = not tries or (m.wild and m.rng.random() < 0.1)
            stand[threads] = ~done & (not gives_up)
        put(m, over, mask & ~stand)
        m.waiting[mask] = stand[mask]
        return stand

    return run
