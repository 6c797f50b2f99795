"""cp.async.bulk: tiles of a tensor in global memory, through a tensor map, into shared memory.

A CUtensorMap is opaque. The tests' cuTensorMapEncodeTiled (fake_runtime.cpp) writes its arguments
into the 128 bytes as they are, and this is where they are read.
"""

import numpy as np

from .machine import Trap, read
from .mbarrier import find
from .transfer import address_of

MAP = np.dtype(
    [
        ("magic", "u4"), ("type_bytes", "u4"), ("rank", "u4"), ("swizzle", "u4"),
        ("address", "u8"), ("size", "u8", 2), ("stride", "u8"), ("box", "u4", 2),
    ]
)  # fmt: skip
MAGIC = 0x7E45024D


def swizzle(address, width):
    """Where a byte of a tile with rows of `width` bytes lies: 16-byte chunks of each eight rows of
    128 bytes change places. An involution on addresses."""
    return address ^ (address >> 3 & width - 16)


def tensor_map(m, address):
    if address % 64 or address + 128 > m.params.size:
        raise Trap("a tensor map lies among the parameters, at a multiple of 64")
    found = m.params[address : address + MAP.itemsize].view(MAP)[0]
    if found["magic"] != MAGIC:
        raise Trap("not a tensor map")
    return found


def bulk_tensor(ins, kernel):
    form = [p for p in ins.op[3:] if p not in ("tile", "L2::cache_hint")]
    if form != ["tensor", "2d", "shared::cluster", "global", "mbarrier::complete_tx::bytes"]:
        raise Trap("form of cp.async.bulk")
    target = address_of(kernel, ins.operands[0], "shared")
    signal = address_of(kernel, ins.operands[2], "shared")
    map_name, _, place = ins.operands[1].strip("[] ").partition(",")
    where = address_of(kernel, map_name, "generic")
    x, y = (read(kernel, t, "s32") for t in place.strip(" {}").split(","))

    def run(m, mask):
        for t in m.threads[mask]:
            box = tensor_map(m, int(where(m)[t]))
            corner = [int(np.broadcast_to(v(m), m.n)[t]) for v in (x, y)]
            start(ins, m, int(t), box, int(target(m)[t]), corner, int(signal(m)[t]))

    return run


def start(ins, m, thread, tensor, target, corner, signal):
    barrier = find(m, m.cta[thread], signal)
    m.shared.load(np.array([signal]), 8, np.array([thread]), atomic=True)
    if barrier.maker is not None:
        raise Trap("no fence between the making of the mbarrier and its use by a bulk copy")
    width = int(tensor["box"][0] * tensor["type_bytes"])
    rows = int(tensor["box"][1])
    if tensor["swizzle"] not in (0, width):
        raise Trap("a tile narrower or wider than its pattern")
    if target % (8 * width if tensor["swizzle"] else 128):
        raise Trap(f"a bulk copy's target at byte {target}: its pattern begins elsewhere")
    data = gather(ins, m, thread, tensor, corner, rows, width)
    if tensor["swizzle"]:
        at = swizzle(np.arange(target, target + data.size), int(tensor["swizzle"]))
        data = data.reshape(-1)[at - target]
    at = m.shared.begin_bulk(target, data.size, thread, barrier.agent)
    if m.counters:
        m.counters.bulk_write(ins, data.size)

    def land():
        m.shared.land_bulk(at, data.reshape(-1), barrier.phase + 1)
        barrier.expect(m, -data.size)

    m.bulk.append(land)


def gather(ins, m, thread, tensor, corner, rows, width):
    """The tile's bytes [rows, width]; zeros where it leaves the tensor."""
    size = int(tensor["type_bytes"])
    x = corner[0] + np.arange(width // size)
    y = corner[1] + np.arange(rows)
    inside = (x >= 0) & (x < int(tensor["size"][0]))
    inside = ((y >= 0) & (y < int(tensor["size"][1])))[:, None] & inside
    addresses = int(tensor["address"]) + y[:, None] * int(tensor["stride"]) + x * size
    data = np.zeros((rows, width // size, size), np.uint8)
    if inside.any():
        wanted = addresses[inside].astype(np.uint64)
        data[inside] = m.memory.load(wanted, size, np.full(len(wanted), thread))
        if m.counters:
            m.counters.bulk_read(ins, wanted.astype(np.int64), size)
    return data.reshape(rows, width)
