"""Are the tests able to see a wrong kernel? Breaks one PTX instruction at a time and runs the
smallest cases that decide about its kernel.

    python python_tests/cuda/mutate.py                       every mutant, half an hour
    python python_tests/cuda/mutate.py --kernel down_kernel --sample 50

A mutant is killed by a Trap (race, wild or uninitialised access, deadlock, endless loop) or by the
check that the tests use, with their tolerances. Mutations:

    drop    a barrier, a fence, or a wait for or commit of asynchronous copies
    swap    two operands that must not be swapped: of sub, shifts, comparisons, selp, mad and fma,
            the registers of an mma's fragment, the parts of a vector load or store
    shift   a load, store, copy or ldmatrix takes place one element further
    index   an integer that was loaded from global memory is one too large

Of the copies that unrolling and inlining make of one source line, the first and the last are
mutated. The sign of a number that is halved by shifts (shr by 31 or 63, and what is taken from
it) is left alone: no number here is negative, so the swapped shift is the same program. Survivors
are listed in mutants.txt, with the reason for each.
"""

import argparse
import copy
import dataclasses
import functools
import pathlib
import random
import sys
import time

import numpy as np
from decisive_cases import CASES
from interpreted import Failed, Interpreter, build
from machine_code import readable
from ptx import Trap
from ptx.machine import COMPILERS, compile_kernel
from ptx.numbers import TYPES

TABLE = pathlib.Path(__file__).with_name("mutants.txt")
DROPPED = {"bar", "barrier", "fence", "membar"}
ORDERED = {"lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"}
PATIENCE = 20  # a mutant may execute so many times the instructions of the kernel before it is dead


@dataclasses.dataclass(frozen=True)
class Mutant:
    kernel: str  # mangled
    at: int  # instruction
    kind: str
    what: str  # where and what, as the table says it

    @property
    def place(self):
        """`what` with single spaces: the key of mutants.txt."""
        return " ".join(self.what.split())

    def apply(self, program):
        """A copy of the program with this mutation."""
        kernel = copy.copy(program.kernels[self.kernel])
        kernel.code = list(kernel.code)
        kernel.code[self.at] = mutated(kernel.code[self.at], self.kind, kernel)
        out = copy.copy(program)
        out.kernels = {**program.kernels, self.kernel: kernel}
        return out


# -- what can be done to an instruction --


def kinds_for(ins):
    """The mutations that make sense here."""
    op, name = ins.op[0], ins.name
    if op in DROPPED or name.startswith(("cp.async.wait", "cp.async.commit")):
        return ["drop"]
    kinds = []
    memory = op in ("ld", "st", "ldmatrix", "atom", "red", "cp") and "param" not in ins.op
    if memory:
        kinds.append("shift")
        is_vector = "v2" in ins.op or "v4" in ins.op  # numbers, not indices
        if op == "ld" and "global" in ins.op and ins.op[-1] in ("u32", "s32") and not is_vector:
            kinds.append("index")
    if swapped(ins) is not None:
        kinds.append("swap")
    return kinds


def mutated(ins, kind, kernel):
    if kind == "drop":
        new = dataclasses.replace(ins, run=lambda m, mask: None)
    elif kind == "index":
        new = dataclasses.replace(ins, run=one_too_large(ins, kernel))
    else:
        new = dataclasses.replace(ins, operands=swapped(ins) if kind == "swap" else shifted(ins))
        new.run = COMPILERS[ins.op[0]](new, kernel)
    new.warp_wide, new.kind = ins.warp_wide, ins.kind
    new.was_run, run = False, new.run

    def watched(m, mask):
        new.was_run = True
        return run(m, mask)

    new.run = watched
    return new


def swapped(ins):
    """Operands with two exchanged that matter, or None."""
    ops, op = list(ins.operands), ins.op[0]
    if op == "mma":
        return [ops[0], _swap_first(ops[1]), *ops[2:]]
    if op in ("ld", "st", "ldmatrix"):
        i = 1 if op == "st" else 0
        if "," not in ops[i]:
            return None
        ops[i] = _swap_first(ops[i])
        return ops
    pair = None
    if op in ("sub", "shl", "shr", "div", "rem") or (op == "setp" and ORDERED & set(ins.op)):
        pair = (1, 2)
    elif op in ("fma", "mad"):
        pair = (2, 3)
    elif op == "selp":
        pair = (1, 2)
    if pair is None or ops[pair[0]] == ops[pair[1]] or ins.op[1:2] == ["wide"]:
        return None
    ops[pair[0]], ops[pair[1]] = ops[pair[1]], ops[pair[0]]
    return ops


def _swap_first(vector):
    parts = [p.strip() for p in vector.strip("{}").split(",")]
    return "{" + ", ".join([parts[1], parts[0], *parts[2:]]) + "}"


def access_bytes(ins):
    if ins.op[0] == "ldmatrix":
        return 16
    if ins.op[0] == "cp":
        return int(ins.operands[2])
    lanes = next((int(p[1]) for p in ins.op if p in ("v2", "v4")), 1)
    return TYPES[ins.op[-1]].itemsize * lanes


def shifted(ins):
    """The address one element further; of a copy, its source."""
    ops = list(ins.operands)
    i = {"st": 0, "red": 0}.get(ins.op[0], 1)
    base, _, offset = ops[i].strip("[] ").partition("+")
    ops[i] = f"[{base}+{int(offset or 0) + access_bytes(ins)}]"
    return ops


def one_too_large(ins, kernel):
    targets = [t.strip() for t in ins.operands[0].strip("{}").split(",")]

    def run(m, mask):
        waiting = ins.run(m, mask)
        register = m.registers[kernel.registers[targets[0]][0]]
        np.copyto(register, register + register.dtype.type(1), where=mask)
        return waiting

    return run


@functools.cache
def mutants():
    """All of them, in the order of files, kernels and instructions."""
    found = []
    _, programs = build("80")
    names = readable(sorted(programs))
    for mangled in sorted(programs, key=names.get):
        if decisive(names[mangled]) is None:
            continue
        kernel = programs[mangled].kernels[mangled]
        if not kernel.compiled:
            compile_kernel(kernel)
        places, signs = {}, set()
        for at, ins in enumerate(kernel.code):
            if ins.op[0] == "shr" and (ins.operands[2] in ("31", "63") or ins.operands[1] in signs):
                signs.add(ins.operands[0])
                continue
            for kind in kinds_for(ins):
                what = f"{names[mangled]:44} {ins.where:28} {kind:6} {ins.name}"
                places.setdefault(what, []).append(Mutant(mangled, at, kind, what))
        for copies in places.values():
            found += (
                copies
                if copies[0].kind == "drop"
                else list({m.at: m for m in (copies[0], copies[-1])}.values())
            )
    return found


def decisive(name):
    """The cases of a kernel, by the start of its name; None: not mutated (a copy for another dtype
    of what is)."""
    return next((cases for start, cases in CASES.items() if name.startswith(start)), None)


# -- running one --


class Patience:
    """In place of counters: stops a kernel that does not end."""

    def __init__(self, limit=None):
        self.limit, self.count = limit, 0

    def instruction(self, ins, mask):
        self.count += 1
        if self.limit and self.count > self.limit:
            raise Trap("the kernel does not end")

    def access(self, *_):
        pass

    def matrix_rows(self, *_):
        pass


class Replay(Interpreter):
    """Interprets from the mutated kernel on; what runs before it, and after it if it changed
    nothing, takes its results from the first run."""

    def __init__(self, states, mutant=None, seed=None):
        super().__init__(seed=seed, counters=Patience(), multiprocessors=1)
        self.states, self.mutant = states, mutant
        self.number, self.same = 0, True
        self.instructions = {}
        if mutant:
            program = mutant.apply(self.programs[mutant.kernel])
            self.programs = {**self.programs, mutant.kernel: program}
            self.instruction = program.kernels[mutant.kernel].code[mutant.at]

    def _launch(self, name, grid, block, shared, args):
        mine, number = name.decode(), self.number
        self.number += 1
        if self.mutant is None:
            status = super()._launch(name, grid, block, shared, args)
            self.states.append(self._memory())
            self.instructions[number] = self.counters.count
            self.counters.count = 0
            return status
        if self.same and mine != self.mutant.kernel:
            for b, (data, known) in zip(
                self.device.memory.buffers.values(), self.states[number][0], strict=True
            ):
                if b.writable:
                    b.bytes[:], b.initialised[:] = data, known
            return 0
        self.counters.count = 0
        self.counters.limit = PATIENCE * self.states[number][1] + 1000
        status = super()._launch(name, grid, block, shared, args)
        self.same = self.same and not status and _equal(self._memory()[0], self.states[number][0])
        return status

    def _memory(self):
        buffers = self.device.memory.buffers.values()
        kept = [
            (b.bytes.copy(), b.initialised.copy()) if b.writable else (None, None) for b in buffers
        ]
        return kept, self.counters.count


def _equal(a, b):
    return all(
        x is None or (np.array_equal(x, y) and np.array_equal(p, q))
        for (x, p), (y, q) in zip(a, b, strict=True)
    )


_states = {}


def runs(case):
    """What every launch of the case left in memory, one list for each Ops that it makes."""
    if case not in _states:
        kept = []

        def make(**_):
            kept.append([])
            return Replay(kept[-1])

        case(make)
        _states[case] = kept
    return _states[case]


def verdict(mutant):
    """How it was killed, or how it survived: (was killed, words)."""
    name, made = mutant.what.split()[0], []
    for case in decisive(name):
        kept = iter(runs(case))

        def make(kept=kept, **_):
            made.append(Replay(next(kept), mutant))
            return made[-1]

        try:
            case(make)
        except Trap as trap:
            return True, f"trap: {trap}"
        except (AssertionError, Failed) as error:
            return True, f"result: {(str(error) or 'differs').strip().splitlines()[0]}"
        except Exception as error:
            return True, f"error: {type(error).__name__}: {error}"
    was_run = any(ops.instruction.was_run for ops in made)
    return False, "SURVIVED" if was_run else "SURVIVED, never executed"


def reasons():
    """{what: reason} of the survivors that mutants.txt explains."""
    out = {}
    for line in TABLE.read_text().splitlines() if TABLE.exists() else []:
        if "  # " in line:
            what, _, reason = line.partition("  # ")
            out[" ".join(what.split())] = reason
    return out


def sample(chosen, count, seed):
    """At most `count` mutants of each kind, drawn at random."""
    out, rng = [], random.Random(seed)
    for kind in sorted({m.kind for m in chosen}):
        these = [m for m in chosen if m.kind == kind]
        out += rng.sample(these, min(count, len(these)))
    return out


def report(chosen, say=print):
    """Runs the mutants; (killed, survivors)."""
    survivors, started = [], time.time()
    for i, mutant in enumerate(chosen, 1):
        was_killed, how = verdict(mutant)
        if not was_killed:
            survivors.append(mutant)
        say(f"[{i}/{len(chosen)} {time.time() - started:.0f} s] {mutant.what}: {how}")
    return len(chosen) - len(survivors), survivors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name starts so")
    parser.add_argument("--kind", default="", help="only this kind of mutation")
    parser.add_argument(
        "--sample", type=int, default=0, help="so many of each kind, drawn at random"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only mutants whose line contains this")
    parser.add_argument("--count", action="store_true", help="only say how many there are")
    arguments = parser.parse_args()
    chosen = [m for m in mutants() if m.what.startswith(arguments.kernel)]
    chosen = [m for m in chosen if arguments.kind in ("", m.kind) and arguments.only in m.place]
    if arguments.sample:
        chosen = sample(chosen, arguments.sample, arguments.seed)
    if arguments.count:
        for kind in sorted({m.kind for m in chosen}):
            print(kind, sum(m.kind == kind for m in chosen))
        return 0
    killed, survivors = report(chosen)
    known = reasons()
    print(f"\n{killed} of {len(chosen)} killed, {killed / max(len(chosen), 1):.1%}")
    for mutant in survivors:
        print(f"{mutant.place}  # {known.get(mutant.place, 'no reason given')}")
    return 0 if killed >= 0.95 * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
