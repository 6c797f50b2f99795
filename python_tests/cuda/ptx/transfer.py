"""Loads, stores, atomics, fences and asynchronous copies."""

import numpy as np

from .machine import Trap, opcode, read, write
from .memory import SHARED_WINDOW
from .numbers import TYPES, flush

# hints that change speed, not meaning
HINTS = {
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "L1::no_allocate",
    "L1::evict_last",
    "L1::evict_first",
    "L2::64B",
    "L2::128B",
    "L2::256B",
}
SCOPES = {"cta", "cluster", "gpu", "sys", "gl"}
SPACES = {"global", "shared", "param"}


def modifiers(ins):
    """(space, vector length, type, strong, acquire, release) of a memory instruction; Trap on what
    is not known."""
    space, vector, strong, acquire, release = "generic", 1, False, False, False
    for part in ins.op[1:-1]:
        if part in SPACES:
            space = part
        elif part in ("v2", "v4"):
            vector = int(part[1])
        elif part in ("volatile", "relaxed", "acquire", "release", "acq_rel"):
            strong = True
            acquire |= part in ("acquire", "acq_rel")
            release |= part in ("release", "acq_rel")
        elif part not in HINTS | SCOPES and ins.op[0] in ("ld", "st"):
            raise Trap(f"modifier .{part}")
    return space, vector, ins.op[-1], strong, acquire, release


def address_of(kernel, text, space):
    base, _sign, offset = text.strip("[] ").partition("+")
    base = base.strip()
    kind = (
        "u32"
        if space == "shared"
        and base in kernel.registers
        and kernel.registers[base][1].itemsize == 4
        else "u64"
    )
    if base.lstrip("-").isdigit():
        base, offset = "0", base
    value, step = read(kernel, base, kind), int(offset or 0)

    def address(m):
        return (value(m).astype(np.int64) + step).astype(np.uint64) + np.zeros(m.n, np.uint64)

    return address


def resolve(m, space, address, mask):
    """(is shared, addresses of the active threads, those threads)."""
    threads = m.threads[mask]
    a = address[mask]
    if space != "generic":
        return space == "shared", a, threads
    inside = a >= SHARED_WINDOW
    if inside.any() and not inside.all():
        raise Trap("one generic access reaches shared and global memory")
    return bool(inside.all()), a - SHARED_WINDOW if inside.all() else a, threads


@opcode("ld")
def load(ins, kernel):
    space, vector, kind, strong, acquire, _ = modifiers(ins)
    size = TYPES[kind].itemsize * vector
    puts = [write(kernel, t, kind) for t in ins.operands[0].strip("{}").split(",")]
    address = address_of(kernel, ins.operands[1], space)

    def run(m, mask):
        if space == "param":
            at = address(m)[mask].astype(np.int64)  # CTAs may be at different turns of a loop
            if (at < 0).any() or (at + size > m.params.size).any():
                raise Trap("parameter access")
            data = np.zeros((m.n, size), np.uint8)
            data[mask] = m.params[at[:, None] + np.arange(size)]
        else:
            shared, a, threads = resolve(m, space, address(m), mask)
            memory = m.shared if shared else m.memory
            data = np.zeros((m.n, size), np.uint8)
            if m.counters:
                m.counters.access(ins, m, mask, "shared" if shared else "global", a, size)
            data[mask] = memory.load(a, size, threads, atomic=strong)
            if strong and not shared:
                for t, where in zip(threads, a, strict=True):
                    m.clocks.flag_read(int(t), int(where), acquire)
        values = np.ascontiguousarray(data).view(TYPES[kind])
        for i, put in enumerate(puts):
            put(m, np.ascontiguousarray(values[:, i]), mask)

    return run


@opcode("st")
def store(ins, kernel):
    space, _vector, kind, strong, _, release = modifiers(ins)
    reads = [read(kernel, t, kind) for t in ins.operands[1].strip("{}").split(",")]
    address = address_of(kernel, ins.operands[0], space)

    def run(m, mask):
        values = np.stack([np.broadcast_to(r(m), m.n) for r in reads], 1)
        data = np.ascontiguousarray(values).view(np.uint8)[mask]
        shared, a, threads = resolve(m, space, address(m), mask)
        if m.counters:
            m.counters.access(ins, m, mask, "shared" if shared else "global", a, data.shape[1])
        if strong and not shared:
            for t, where in zip(threads, a, strict=True):
                m.clocks.flag_write(int(t), int(where), release, keep=False)
        (m.shared if shared else m.memory).store(a, data, threads, atomic=strong)

    return run


ATOMICS = {
    "add": lambda old, v: old + v,
    "inc": lambda old, v: old.dtype.type(0) if old >= v else old + old.dtype.type(1),
    "min": min,
    "max": max,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v,
    "exch": lambda old, v: v,
}


@opcode("atom", "red")
def atomic(ins, kernel):
    space, vector, kind, _, acquire, release = modifiers(ins)
    if vector > 1:
        return vector_add(ins, kernel, vector)
    unknown = (
        set(ins.op[1:-1])
        - SPACES
        - SCOPES
        - set(ATOMICS)
        - {"relaxed", "acquire", "release", "acq_rel", "cas"}
    )
    if unknown:
        raise Trap(f"atomic modifiers {sorted(unknown)}")
    operands = ins.operands if ins.op[0] == "atom" else ["_", *ins.operands]
    put = write(kernel, operands[0], kind)
    address = address_of(kernel, operands[1], space)
    values = [read(kernel, t, kind) for t in operands[2:]]
    name = next(p for p in ins.op[1:] if p in ATOMICS or p == "cas")
    size, dtype = TYPES[kind].itemsize, TYPES[kind]

    def run(m, mask):
        shared, a, threads = resolve(m, space, address(m), mask)
        memory = m.shared if shared else m.memory
        args = [np.broadcast_to(v(m), m.n)[mask] for v in values]
        out = np.zeros(m.n, dtype)
        if m.counters:
            m.counters.access(ins, m, mask, "shared" if shared else "global", a, size)
        order = m.rng.permutation(len(a)) if m.wild else np.arange(len(a))
        for i in order:  # any order is allowed
            t, one = threads[i : i + 1], a[i : i + 1]
            old = memory.load(one, size, t, atomic=True).view(dtype)[0, 0]
            new = (
                (args[1][i] if old == args[0][i] else old)
                if name == "cas"
                else ATOMICS[name](old, args[0][i])
            )
            if not shared:
                m.clocks.flag_read(int(t[0]), int(one[0]), acquire)
                m.clocks.flag_write(int(t[0]), int(one[0]), release, keep=True)
            memory.store(one, np.array([[new]], dtype).view(np.uint8), t, atomic=True)
            out[t[0]] = old
        put(m, out, mask)

    return run


def vector_add(ins, kernel, vector):
    """{atom,red}.global.add.v2.f32 of sm_90: floats are added one by one, subnormals flushed."""
    if ins.op[1:] != ["global", "add", f"v{vector}", "f32"]:
        raise Trap("vector atomic")
    wants, where, added = ins.operands if ins.op[0] == "atom" else ["", *ins.operands]
    puts = [write(kernel, t, "f32") for t in wants.strip("{}").split(",") if t]
    reads = [read(kernel, t, "f32") for t in added.strip("{}").split(",")]
    address, size = address_of(kernel, where, "global"), 4 * vector

    def run(m, mask):
        _, a, threads = resolve(m, "global", address(m), mask)
        if len(np.unique(a)) < len(a):
            raise Trap("lanes add to the same place: the sum depends on their order")
        if m.counters:
            m.counters.access(ins, m, mask, "global", a, size)
        values = np.stack([np.broadcast_to(r(m), m.n)[mask] for r in reads], 1)
        before = np.ascontiguousarray(m.memory.load(a, size, threads, atomic=True))
        before = before.view(np.float32)
        sums = flush(flush(before) + flush(values))
        m.memory.store(a, np.ascontiguousarray(sums).view(np.uint8), threads, atomic=True)
        for i, put in enumerate(puts):
            old = np.zeros(m.n, np.float32)
            old[mask] = before[:, i]
            put(m, old, mask)

    return run


@opcode("fence", "membar")
def fence(ins, kernel):
    if ins.op[1:3] == ["proxy", "async"] and set(ins.op[3:]) <= {"shared"}:
        return proxy_fence
    if ins.op[1:] == ["mbarrier_init", "release", "cluster"]:
        return show_mbarriers
    if not set(ins.op[1:]) <= SCOPES | {"sc", "acq_rel"}:
        raise Trap("kind of fence")
    return lambda m, mask: m.clocks.fence(m.threads[mask])


def proxy_fence(m, mask):
    show_mbarriers(m, mask)
    for cta in np.unique(m.cta[mask]):
        m.clocks.proxy_fence(m.threads[mask & (m.cta == cta)])


def show_mbarriers(m, mask):
    """The asynchronous proxy may use the mbarriers that these threads made."""
    for barrier in m.mbarriers.values():
        if barrier.maker is not None and mask[barrier.maker]:
            barrier.maker = None


@opcode("cvta")
def cvta(ins, kernel):
    """Generic addresses of global memory are the global ones; shared memory has a window."""
    value, put = read(kernel, ins.operands[1], "u64"), write(kernel, ins.operands[0], "u64")
    if "shared" in ins.op:
        back = "to" in ins.op
        return lambda m, mask: put(
            m, value(m) - SHARED_WINDOW if back else value(m) + SHARED_WINDOW, mask
        )
    if not {"global", "param"} & set(ins.op):
        raise Trap("cvta of this space")
    return lambda m, mask: put(m, value(m), mask)


@opcode("prefetch", "prefetchu", "applypriority", "discard")
def hint(ins, kernel):
    return lambda m, mask: None


@opcode("nanosleep")
def nanosleep(ins, kernel):
    return lambda m, mask: None


@opcode("trap")
def trap(ins, kernel):
    def run(m, mask):
        raise Trap("the kernel executed trap")

    return run


# -- cp.async: the source is read at the start, the target written as late as the program allows --


@opcode("cp")
def cp(ins, kernel):
    if ins.op[1] != "async":
        raise Trap("cp other than cp.async")
    if ins.op[2] == "bulk":
        from .bulk import bulk_tensor

        return bulk_tensor(ins, kernel)
    if ins.op[2] == "commit_group":
        return commit
    if ins.op[2] in ("wait_group", "wait_all"):
        keep = int(ins.operands[0]) if ins.op[2] == "wait_group" else None
        return lambda m, mask: wait(m, mask, keep)
    return cp_async(ins, kernel)


def cp_async(ins, kernel):
    if not {"shared", "global"} <= set(ins.op):
        raise Trap("spaces of cp.async")
    if unknown := set(ins.op[2:]) - {"shared", "global"} - HINTS:
        raise Trap(f"modifiers {sorted(unknown)}")
    size = int(ins.operands[2])
    if size not in (4, 8, 16) or ("cg" in ins.op and size != 16):
        raise Trap(f"cp.async of {size} bytes")
    target, source = (
        address_of(kernel, ins.operands[0], "shared"),
        address_of(kernel, ins.operands[1], "global"),
    )
    real = read(kernel, ins.operands[3], "u32") if len(ins.operands) > 3 else None

    def run(m, mask):
        threads = m.threads[mask]
        count = np.full(m.n, size) if real is None else np.broadcast_to(real(m), m.n)
        count = count[mask]
        if not np.isin(count, (0, size)).all():
            raise Trap("cp.async with a part of its bytes")
        data = np.zeros((len(threads), size), np.uint8)  # what is not read becomes zero
        come = source(m)[mask]
        if m.counters:
            m.counters.access(ins, m, mask, "shared", target(m)[mask], size)
            m.counters.access(
                ins, m, mask & _scatter(m, mask, count > 0), "global", come[count > 0], size
            )
        if (count > 0).any():
            data[count > 0] = m.memory.load(come[count > 0], size, threads[count > 0])
        place = m.shared.begin_copy(target(m)[mask], size, threads)
        m.copies.setdefault("open", []).append((place, data, threads))

    return run


def _scatter(m, mask, part):
    out = np.zeros(m.n, bool)
    out[m.threads[mask][part]] = True
    return out


def commit(m, mask):
    """Each thread closes a group of its copies; a copy is kept with its group's number."""
    number = m.copies.setdefault("number", np.zeros(m.n, np.int64))
    still = []
    for place, data, threads in m.copies.get("open", []):
        mine = mask[threads]
        if mine.any():
            m.groups.append((place[mine], data[mine], threads[mine], number[threads[mine]]))
        if not mine.all():
            still.append((place[~mine], data[~mine], threads[~mine]))
    m.copies["open"] = still
    number[mask] += 1


def wait(m, mask, keep):
    """Lands the copies of all but the newest `keep` groups of each thread (None: of all, committed
    or not)."""
    if keep is None:
        commit(m, mask)
        keep = 0
    number = m.copies.setdefault("number", np.zeros(m.n, np.int64))
    rest = []
    for place, data, threads, group in m.groups:
        due = mask[threads] & (group < number[threads] - keep)
        if due.any():
            m.shared.end_copy(place[due], data[due], threads[due])
        if not due.all():
            rest.append((place[~due], data[~due], threads[~due], group[~due]))
    m.groups = rest
