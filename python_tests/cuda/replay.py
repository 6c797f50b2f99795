"""Runs a decisive case again with one kernel changed, and only what can differ.

The first run of a case records, for every launch, which instructions were executed and what memory
held afterwards. A second run takes the results of launches that execute no changed instruction from
there, as long as nothing differs yet.
"""

import time
from itertools import chain, repeat

import numpy as np
from interpreted import SMALL, Interpreter
from ptx import Trap

OPTIONS = dict(multiprocessors=1, parts=1, **SMALL)
PATIENCE = 20  # a changed kernel may execute so many times the instructions of the right one


class Steps:
    """In place of counters: what was executed, and how often; stops a kernel that does not end."""

    products = 0

    def __init__(self):
        self.begin()

    def begin(self, limit=None):
        self.limit, self.count, self.executed, self.boxes = limit, 0, {}, 0

    def instruction(self, ins, mask):
        self.count += 1
        if self.limit is None:
            if id(ins) not in self.executed and mask.any():
                self.executed[id(ins)] = ins
        elif self.count > self.limit:
            raise Trap("the kernel does not end")

    def access(self, *_):
        pass

    matrix_rows = matrix = bulk_read = access

    def bulk_write(self, *_):
        self.boxes += 1


class Launch:
    """What the first run's launch did."""

    def __init__(self, arch, mangled, kernel, steps, memory, seconds):
        self.kernel = (arch, mangled)
        self.executed = {i for i, x in enumerate(kernel.code) if id(x) in steps.executed}
        self.count, self.boxes = steps.count, steps.boxes
        self.memory, self.seconds = memory, seconds

    def executes(self, place):
        """place: (arch, mangled name, number of an instruction)"""
        *kernel, at = place
        return tuple(kernel) == self.kernel and at in self.executed


class Recorded(Interpreter):
    def __init__(self, launches, **options):
        super().__init__(counters=Steps(), **{**OPTIONS, **options})
        self.recorded = launches

    def _launch(self, name, grid, block, shared, args):
        self.counters.begin()
        started = time.process_time()
        super()._launch(name, grid, block, shared, args)
        seconds = time.process_time() - started
        mangled = name.decode()
        kernel = self.programs[mangled].kernels[mangled]
        memory = memory_of(self.device, self.recorded[-1].memory if self.recorded else [])
        self.recorded.append(Launch(self.arch, mangled, kernel, self.counters, memory, seconds))


class Replay(Interpreter):
    def __init__(self, launches, mutant, **options):
        super().__init__(counters=Steps(), **{**OPTIONS, **options})
        self.recorded, self.changed = launches, mutant.place
        program = mutant.apply(self.programs[mutant.mangled])
        self.programs = {**self.programs, mutant.mangled: program}
        self.number, self.same = 0, True

    def _launch(self, name, grid, block, shared, args):
        before = self.recorded[self.number] if self.number < len(self.recorded) else None
        self.number += 1
        if self.same and not before.executes(self.changed):
            put_memory(self.device, before.memory)
            self.boxes[name.decode()] += before.boxes
            return
        self.counters.begin(PATIENCE * (before.count if before else 10**6) + 1000)
        super()._launch(name, grid, block, shared, args)
        self.same = self.same and all(
            holds(b, *m) for b, m in zip(writable(self.device), before.memory, strict=True)
        )


def writable(device):
    return [buffer for buffer in device.memory.buffers.values() if buffer.writable]


def holds(buffer, data, known):
    return np.array_equal(buffer.bytes, data) and np.array_equal(buffer.initialised, known)


def memory_of(device, before):
    """(bytes, which are initialised) of every writable buffer; what is as before is not copied."""
    return [
        old if old and holds(buffer, *old) else (buffer.bytes.copy(), buffer.initialised.copy())
        for buffer, old in zip(writable(device), chain(before, repeat(None)), strict=False)
    ]


def put_memory(device, memory):
    for buffer, (data, known) in zip(writable(device), memory, strict=True):
        buffer.bytes[:], buffer.initialised[:] = data, known


def record(case):
    """The launches of a first run, a list for every Ops that the case makes."""
    ops = []

    def make(**options):
        ops.append([])
        return Recorded(ops[-1], **options)

    case(make)
    return ops


class Run:
    """A case and its first run."""

    def __init__(self, case, ops=None):
        self.case, self.ops = case, record(case) if ops is None else ops

    def seconds_of(self, place):
        """Of the launches that execute an instruction, and a little; 0 if none does."""
        seconds = [x.seconds for ops in self.ops for x in ops if x.executes(place)]
        return sum(seconds, 0.02) if seconds else 0

    def again(self, mutant):
        """Runs the case with a mutant; raises if it is noticed."""
        kept = iter(self.ops)
        self.case(lambda **options: Replay(next(kept), mutant, **options))
