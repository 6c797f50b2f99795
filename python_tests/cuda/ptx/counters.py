"""What a kernel asks of the machine: instructions by class, global sectors, shared-memory bank
conflicts.

A global request of a warp moves whole sectors of 32 bytes; the fewest it could have moved is its
bytes / 32. Shared memory has 32 banks of 4 bytes and serves one row of banks per cycle: a conflict
is a cycle beyond the fewest possible.
"""

from collections import defaultdict

import numpy as np

CLASSES = {
    "mma": ("mma", "wgmma"),
    "ldmatrix": ("ldmatrix",),
    "async_copy": ("cp",),
    "load_store": ("ld", "st", "atom", "red"),
    "barrier": ("bar", "barrier", "mbarrier"),
    "collective": ("shfl", "vote", "redux", "match"),
    "branch": ("bra", "ret", "exit"),
    "transcendental": ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"),
}
CLASS_OF = {op: name for name, ops in CLASSES.items() for op in ops}


def classify(ins):
    if ins.op[0] == "wgmma" and ins.op[1] != "mma_async":
        return "barrier"
    if ins.op[0] in CLASS_OF:
        return CLASS_OF[ins.op[0]]
    return "float" if ins.op[-1] in ("f32", "f64", "f16x2", "bf16x2") else "integer"


class Traffic:
    def __init__(self):
        self.requests = self.units = self.least = 0

    def add(self, requests, units, least):
        self.requests += int(requests)
        self.units += int(units)
        self.least += int(least)

    @property
    def excess(self):
        return self.units - self.least

    def __repr__(self):
        return f"{self.requests} requests, {self.units} units, at least {self.least}"


class Counters:
    def __init__(self):
        self.instructions = defaultdict(int)  # class -> warp instructions
        self.opcodes = defaultdict(int)
        self.products = 0  # of wgmma, in mma.m16n8k16
        self.boxes = 0  # that the copy engine brought
        # (source line, opcode) -> Traffic in sectors of global memory, cycles of shared memory
        self.sectors, self.cycles = defaultdict(Traffic), defaultdict(Traffic)

    def instruction(self, ins, mask):
        warps = int(mask.reshape(-1, 32).any(1).sum())
        self.instructions[ins.kind] += warps
        self.opcodes[ins.op[0]] += warps

    def total(self, traffic):
        out = Traffic()
        for t in traffic.values():
            out.add(t.requests, t.units, t.least)
        return out

    def access(self, ins, m, mask, space, addresses, size):
        warp = m.threads[mask] // 32
        if not len(warp):
            return
        if space == "global":
            self._sectors(ins, warp, addresses.astype(np.int64), size)
        else:  # 16-byte accesses are served 8 lanes at a time, 8-byte ones 16
            lanes = min(32, 128 // size)
            phase = m.threads[mask] // lanes
            self._banks(ins, warp, phase, addresses.astype(np.int64), size)

    def matrix_rows(self, ins, m, threads, addresses):
        """ldmatrix: eight rows of 16 bytes at a time."""
        self._banks(ins, threads // 32, threads // 8, addresses.astype(np.int64), 16)

    def matrix(self, ins, chunks):
        """wgmma: eight chunks of 16 bytes at a time, those of neighbouring rows."""
        flat = chunks.T.reshape(-1).astype(np.int64)
        self._banks(ins, np.zeros_like(flat), np.arange(len(flat)) // 8, flat, 16)

    def bulk_read(self, ins, addresses, size):
        self._sectors(ins, np.zeros_like(addresses), addresses, size)

    def bulk_write(self, ins, size):
        self.boxes += 1
        self.cycles[ins.where, ins.op[0]].add(1, size // 128, size // 128)

    def _sectors(self, ins, warp, addresses, size):
        first, last = addresses // 32, (addresses + size - 1) // 32
        sectors = np.unique(
            np.concatenate([np.stack([warp, first], 1), np.stack([warp, last], 1)]), axis=0
        )
        covered = np.unique(
            np.stack([warp, addresses], 1), axis=0
        )  # lanes at one address move it once
        least = (np.unique(covered[:, 0], return_counts=True)[1] * size + 31) // 32
        self.sectors[ins.where, ins.op[0]].add(len(np.unique(warp)), len(sectors), least.sum())

    def _banks(self, ins, warp, phase, addresses, size):
        words = addresses[:, None] // 4 + np.arange(max(size // 4, 1))
        table = np.stack([np.repeat(phase, words.shape[1]), words.reshape(-1)], 1)
        table = np.unique(table, axis=0)  # one word is read once, whoever wants it
        rows = np.unique(np.stack([table[:, 0], table[:, 1] % 32], 1), axis=0, return_counts=True)
        _phases, start = np.unique(rows[0][:, 0], return_index=True)
        worst = np.maximum.reduceat(rows[1], start)
        words_each = np.unique(table[:, 0], return_counts=True)[1]
        least = (words_each + 31) // 32
        self.cycles[ins.where, ins.op[0]].add(len(np.unique(warp)), worst.sum(), least.sum())
