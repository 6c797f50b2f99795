"""Collectives: barriers, shuffles, votes. They wait for every lane that is named."""

import numpy as np

from .machine import Trap, opcode, read, write

FULL = np.uint32(0xFFFFFFFF)


def members(m, mask, named):
    """(lanes whose partners are all here, lanes that must wait). named: membermask per thread."""
    lanes = mask.reshape(-1, 32)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    here = np.repeat((lanes * bits).sum(1, dtype=np.uint32), 32)
    named = np.broadcast_to(named, m.n)
    own = np.tile(bits, m.n // 32)
    if (mask & ((named & own) == 0)).any():
        raise Trap("a lane executes a collective that does not name it")
    # partners must name the same lanes
    first = np.repeat(
        np.where(lanes.any(1), named.reshape(-1, 32)[np.arange(len(lanes)), lanes.argmax(1)], 0), 32
    )
    if (mask & (named != first)).any():
        raise Trap("lanes of one warp name different partners")
    ready = mask & ((named & ~here) == 0)
    gone = np.repeat((m.done.reshape(-1, 32) * bits).sum(1, dtype=np.uint32), 32)
    if (mask & ~ready & ((named & gone) != 0)).any():
        raise Trap("a named lane has exited")
    return ready, mask & ~ready


@opcode("bar", "barrier", warp_wide=True)
def barrier(ins, kernel):
    if ins.op[1] == "warp":
        named = read(kernel, ins.operands[0], "u32")

        def sync_warp(m, mask):
            ready, waiting = members(m, mask, named(m))
            for w in np.flatnonzero(ready.reshape(-1, 32).any(1)):
                m.clocks.synchronise(w * 32 + np.flatnonzero(ready[w * 32 : w * 32 + 32]))
            return waiting

        return sync_warp
    kind = [p for p in ins.op[1:] if p not in ("cta", "aligned")]
    if kind not in (["sync"], ["red", "or", "pred"]):
        raise Trap("kind of barrier")
    operands = list(ins.operands)
    asks = kind != ["sync"]  # whether any thread's predicate holds
    put = write(kernel, operands.pop(0), "pred") if asks else None
    vote = read(kernel, operands.pop(), "pred") if asks else None
    identity = read(kernel, operands[0], "u32")
    count = read(kernel, operands[1], "u32") if len(operands) > 1 else None

    def sync(m, mask):
        mask, waiting = members(m, mask, FULL)
        m.barrier[mask] = np.broadcast_to(identity(m), m.n)[mask]
        m.for_all[mask] = count is None
        m.asks[mask] = asks
        if asks:
            m.votes[mask] = np.broadcast_to(vote(m), m.n)[mask]
            m.answers.append((put, mask.copy()))
        for cta in np.unique(m.cta[mask]):
            part = slice(cta * m.per, (cta + 1) * m.per)
            for name in np.unique(m.barrier[part][mask[part]]):
                standing = (m.barrier == name) & (m.cta == cta)
                if len(set(m.asks[standing])) > 1:
                    raise Trap("some threads ask at the barrier, others only wait")
                need = (
                    m.per
                    if count is None
                    else int(np.broadcast_to(count(m), m.n)[standing & mask][0])
                )
                if count is None and m.done[part].any():
                    raise Trap("a thread of the CTA has exited before the barrier")
                if standing.sum() == need:
                    m.barrier[standing] = -1
                    m.clocks.synchronise(np.flatnonzero(standing))
                    if asks:
                        answer_all(m, standing, m.votes[standing].any())
        return waiting

    return sync


def answer_all(m, standing, answer):
    """Writes what a barrier was asked for where every one of its threads wants it."""
    for put, asking in m.answers:
        put(m, np.full(m.n, answer), asking & standing)
        asking &= ~standing
    m.answers = [(put, asking) for put, asking in m.answers if asking.any()]


@opcode("shfl", warp_wide=True)
def shuffle(ins, kernel):
    if ins.op[1] != "sync" or ins.op[3] != "b32":
        raise Trap("form of shfl")
    mode = ins.op[2]
    target, _, predicate = ins.operands[0].partition("|")
    put, put_p = write(kernel, target, "b32"), write(kernel, predicate or "_", "pred")
    value, by, clamp, named = (read(kernel, t, "u32") for t in ins.operands[1:])

    def run(m, mask):
        ready, waiting = members(m, mask, named(m))
        b, c = (np.broadcast_to(r(m), m.n).astype(np.int64) for r in (by, clamp))
        lane = m.threads % 32
        segment = c >> 8 & 31
        high = (lane & segment) | (c & 31 & ~segment)
        low = lane & segment
        b = b & 31
        if mode == "up":
            j = lane - b
            valid = j >= high
        elif mode == "down":
            j = lane + b
            valid = j <= high
        elif mode == "bfly":
            j = lane ^ b
            valid = j <= high
        elif mode == "idx":
            j = low | (b & ~segment)
            valid = j <= high
        else:
            raise Trap("mode of shfl")
        j = np.where(valid, j, lane)
        source = m.threads - lane + j
        if (ready & ~ready[source]).any():
            raise Trap("reads a lane that takes no part")
        put(m, np.broadcast_to(value(m), m.n)[source], ready)
        put_p(m, valid, ready)
        return waiting

    return run


def per_warp(m, flags):
    """Sum of bits of the lanes where flags hold, for every thread of the warp."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    return np.repeat((flags.reshape(-1, 32) * bits).sum(1, dtype=np.uint32), 32)


@opcode("vote", warp_wide=True)
def vote(ins, kernel):
    if ins.op[1] != "sync":
        raise Trap("form of vote")
    kind = "b32" if ins.op[2] == "ballot" else "pred"
    put = write(kernel, ins.operands[0], kind)
    value, named = read(kernel, ins.operands[1], "pred"), read(kernel, ins.operands[2], "u32")

    def run(m, mask):
        ready, waiting = members(m, mask, named(m))
        yes = per_warp(m, ready & np.broadcast_to(value(m), m.n))
        if ins.op[2] == "ballot":
            result = yes
        else:
            everyone = per_warp(m, ready)
            result = {
                "any": yes != 0,
                "all": yes == everyone,
                "uni": (yes == 0) | (yes == everyone),
            }[ins.op[2]]
        put(m, result, ready)
        return waiting

    return run


@opcode("redux", warp_wide=True)
def redux(ins, kernel):
    functions = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    kind, reduce = ins.op[-1], functions[ins.op[2]]
    put, value, named = (
        write(kernel, ins.operands[0], kind),
        read(kernel, ins.operands[1], kind),
        read(kernel, ins.operands[2], "u32"),
    )

    def run(m, mask):
        ready, waiting = members(m, mask, named(m))
        out = np.zeros(m.n, np.asarray(value(m)).dtype)
        v = np.broadcast_to(value(m), m.n)
        for w in np.flatnonzero(ready.reshape(-1, 32).any(1)):
            lanes = w * 32 + np.flatnonzero(ready[w * 32 : w * 32 + 32])
            out[lanes] = reduce.reduce(v[lanes], dtype=out.dtype)
        put(m, out, ready)
        return waiting

    return run
