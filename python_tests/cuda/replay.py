"""Runs a decisive case again with one kernel changed, and only what can differ.

The first run of a case records, for every launch, which instructions were executed and what memory
held afterwards. A second run takes the results of launches that execute no changed instruction from
there, as long as nothing differs yet.
"""

import functools
import time

import numpy as np
from interpreted import SMALL, Interpreter
from ptx import Trap

PATIENCE = 20  # a changed kernel may execute so many times the instructions of the right one


class Steps:
    """In place of counters: what was executed, and how often; stops a kernel that does not end."""

    def __init__(self):
        self.limit, self.count, self.executed, self.products = None, 0, {}, 0

    def begin(self, limit=None):
        self.limit, self.count, self.executed = limit, 0, {}

    def instruction(self, ins, mask):
        self.count += 1
        if self.limit is None:
            if id(ins) not in self.executed and mask.any():
                self.executed[id(ins)] = ins
        elif self.count > self.limit:
            raise Trap("the kernel does not end")

    def access(self, *_):
        pass

    matrix_rows = matrix = bulk_read = bulk_write = access


class Launch:
    """What the first run's launch did."""

    def __init__(self, arch, mangled, kernel, steps, memory, seconds):
        code = enumerate(kernel.code)
        self.executed = {(arch, mangled, i) for i, x in code if id(x) in steps.executed}
        self.count, self.memory, self.seconds = steps.count, memory, seconds


class Recorded(Interpreter):
    def __init__(self, launches, **options):
        super().__init__(counters=Steps(), macros=SMALL, **{"multiprocessors": 1, **options})
        self.recorded = launches

    def _launch(self, name, grid, block, shared, args):
        self.counters.begin()
        started = time.process_time()
        status = super()._launch(name, grid, block, shared, args)
        seconds = time.process_time() - started
        mangled = name.decode()
        kernel = self.programs[mangled].kernels[mangled]
        memory = memory_of(self.device)
        self.recorded.append(Launch(self.arch, mangled, kernel, self.counters, memory, seconds))
        return status


class Replay(Interpreter):
    def __init__(self, launches, mutant, **options):
        super().__init__(counters=Steps(), macros=SMALL, **{"multiprocessors": 1, **options})
        self.recorded, self.changed = launches, mutant.place
        program = mutant.apply(self.programs[mutant.mangled])
        self.programs = {**self.programs, mutant.mangled: program}
        self.number, self.same = 0, True

    def _launch(self, name, grid, block, shared, args):
        before = self.recorded[self.number] if self.number < len(self.recorded) else None
        self.number += 1
        if self.same and self.changed not in before.executed:
            put_memory(self.device, before.memory)
            return 0
        self.counters.begin(PATIENCE * (before.count if before else 10**6) + 1000)
        status = super()._launch(name, grid, block, shared, args)
        self.same = self.same and not status and equal(memory_of(self.device), before.memory)
        return status


def memory_of(device):
    buffers = device.memory.buffers.values()
    return [(b.bytes.copy(), b.initialised.copy()) for b in buffers if b.writable]


def put_memory(device, memory):
    buffers = [b for b in device.memory.buffers.values() if b.writable]
    for buffer, (data, known) in zip(buffers, memory, strict=True):
        buffer.bytes[:], buffer.initialised[:] = data, known


def equal(a, b):
    return all(
        np.array_equal(x, y) and np.array_equal(p, q) for (x, p), (y, q) in zip(a, b, strict=True)
    )


class Run:
    """The first run of a case."""

    def __init__(self, case):
        self.case, self.ops = case, []  # launches of every Ops that the case makes

        def make(**options):
            self.ops.append([])
            return Recorded(self.ops[-1], **options)

        case(make)
        self.executed = set().union(*(launch.executed for ops in self.ops for launch in ops))

    def seconds_of(self, place):
        """Of the launches that execute an instruction, and a little."""
        return 0.02 + sum(x.seconds for ops in self.ops for x in ops if place in x.executed)

    def again(self, mutant):
        """Runs the case with a mutant; raises if it is noticed."""
        kept = iter(self.ops)
        self.case(lambda **options: Replay(next(kept), mutant, **options))


@functools.cache
def runs(cases):
    return [Run(case) for case in cases]
