"""What can be done to a PTX instruction so that the kernel is wrong, and all mutants of this kind.

    drop    a barrier, a fence, or a wait for or commit of asynchronous copies
    swap    two operands that must not be swapped: of sub, shifts, comparisons, selp, mad and fma,
            the registers of an mma's fragment, the parts of a vector load or store
    shift   a load, store, copy or ldmatrix takes place one element further
    index   an integer that was loaded from global memory is one too large

and of sm_90a's instructions

    drop    also an arrival at an mbarrier, a wait for one, a bulk copy, a wgmma
    swap    the coordinates of a bulk copy, the two matrices of a wgmma
    shift   a bulk copy begins one column further, a wgmma's left matrix 16 bytes
    right   a wgmma's right matrix begins 16 bytes further
    flip    a wgmma takes its right matrix the other way; a wait is for an mbarrier's other phase
    count   an mbarrier is made for one arrival more, or expects 16 bytes more

Of the copies that unrolling and inlining make of one source line, the first and the last are
mutated, and of barriers all. Left alone is what makes no other program: the sign of a number that
is halved by shifts (shr by 31 or 63, and what is taken from it), because no number here is
negative, and a result that nobody reads. What an mma multiplies is no index. Kernels of one
template for several dtypes are mutated for the first of bf16, fp32, fp16 that exists, and where
they multiply for fp32 too, which is TF32.
"""

import copy
import dataclasses
import functools
import re

import numpy as np
from interpreted import build
from machine_code import readable
from nvcc import ROOT
from ptx.machine import COMPILERS, compile_kernel, write
from ptx.numbers import TYPES

DROPPED = {"bar", "barrier", "fence", "membar"}
ORDERED = {"lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"}
HOPPER = {  # how names begin -> {kind: (operand, which of the values in it, what becomes of it)}
    "mbarrier.init": {"drop": None, "count": (1, 0, lambda v: v + 1)},
    "mbarrier.arrive.expect_tx": {"drop": None, "count": (2, 0, lambda v: v + 16)},
    "mbarrier.arrive": {"drop": None},
    "mbarrier.try_wait": {"drop": None, "flip": (2, 0, lambda v: v ^ 1)},
    "cp.async.bulk": {"drop": None, "swap": None, "shift": (1, 1, lambda v: v + 1)},
    "wgmma.mma_async": {
        "drop": None,
        "swap": None,
        "shift": (1, 0, lambda v: v + 1),  # descriptors count in 16 bytes
        "right": (2, 0, lambda v: v + 1),
        "flip": (-1, 0, lambda v: v ^ 1),
    },
    "wgmma": {"drop": None},
}
MEMORY = {"ld", "st", "ldmatrix", "atom", "red", "cp"}
MOVES = ("cp.async.bulk", "wgmma.mma_async")  # these do work, others order it
NO_RESULT = {"st", "red", "cp", "bra", "mbarrier", "wgmma", "setmaxnreg", *DROPPED}
DTYPES = ("bfloat16", "float", "__half")  # as they stand in kernels' names


@dataclasses.dataclass(frozen=True)
class Mutant:
    arch: str
    mangled: str
    at: int  # instruction
    kind: str
    where: str  # file:line
    what: str  # one line; what mutants.txt says, and no line number in it

    def __str__(self):
        return f"{self.what}  ({self.where})"

    @property
    def place(self):
        return self.arch, self.mangled, self.at

    def apply(self, program):
        """A copy of the program with this mutation."""
        kernel = copy.copy(program.kernels[self.mangled])
        kernel.code = list(kernel.code)
        kernel.code[self.at] = mutated(kernel.code[self.at], self.kind, kernel)
        out = copy.copy(program)
        out.kernels = {**program.kernels, self.mangled: kernel}
        return out


def hopper(ins):
    """The entry of HOPPER for an instruction, or None."""
    return next((kinds for start, kinds in HOPPER.items() if ins.name.startswith(start)), None)


def kinds_for(ins):
    """The mutations that make sense here."""
    op, name = ins.op[0], ins.name
    if (kinds := hopper(ins)) is not None:
        return list(kinds)
    if op in DROPPED or name.startswith(("cp.async.wait", "cp.async.commit")):
        return ["drop"]
    kinds = []
    if op in MEMORY and "param" not in ins.op:
        kinds.append("shift")
        is_vector = "v2" in ins.op or "v4" in ins.op  # numbers, not indices
        if op == "ld" and "global" in ins.op and ins.op[-1] in ("u32", "s32") and not is_vector:
            kinds.append("index")
    if swapped(ins) is not None:
        kinds.append("swap")
    return kinds


def mutated(ins, kind, kernel):
    change = (hopper(ins) or {}).get(kind)
    if ins.name.startswith("mbarrier.try_wait") and kind == "drop":
        put = write(kernel, ins.operands[0], "pred")
        new = dataclasses.replace(ins, run=lambda m, mask: put(m, np.True_, mask))
    elif kind == "drop":
        new = dataclasses.replace(ins, run=lambda m, mask: None)
    elif change is not None:
        new = with_value(ins, kernel, *change)
    elif kind == "index":
        new = dataclasses.replace(ins, run=one_too_large(ins, kernel))
    else:
        new = dataclasses.replace(ins, operands=swapped(ins) if kind == "swap" else shifted(ins))
        new.run = COMPILERS[ins.op[0]](new, kernel)
    new.warp_wide, new.kind = ins.warp_wide, ins.kind
    return new


def with_value(ins, kernel, operand, which, change):
    """The instruction with another value in an operand: a number, or what a register holds."""
    text = ins.operands[operand]
    value = list(re.finditer(r"%\w+|-?\d+", text))[which]
    if value[0] not in kernel.registers:
        ops = list(ins.operands)
        ops[operand] = f"{text[: value.start()]}{change(int(value[0]))}{text[value.end() :]}"
        new = dataclasses.replace(ins, operands=ops)
        new.run = COMPILERS[ins.op[0]](new, kernel)
        return new

    def run(m, mask):
        register = m.registers[kernel.registers[value[0]][0]]
        kept = register.copy()
        register[:] = change(kept)
        waiting = ins.run(m, mask)
        register[:] = kept
        return waiting

    return dataclasses.replace(ins, run=run)


def swapped(ins):
    """Operands with two exchanged that matter, or None."""
    ops, op = list(ins.operands), ins.op[0]
    if op == "wgmma":
        return [ops[0], ops[2], ops[1], *ops[3:]]
    if ins.name.startswith("cp.async.bulk"):
        return [ops[0], re.sub(r"\{(.*), (.*)\}", r"{\2, \1}", ops[1]), *ops[2:]]
    if op == "mma":
        return [ops[0], _swap_first(ops[1]), *ops[2:]]
    if op in ("ld", "st", "ldmatrix"):
        i = 1 if op == "st" else 0
        if "," not in ops[i] or _swap_first(ops[i]) == "{" + ops[i].strip("{}") + "}":
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


# -- all of them --


@functools.cache
def mutants():
    """In the order of architectures, kernels, source lines and instructions: sm_90a's own kernels
    there, all others as compiled for sm_80."""
    found = []
    for arch in ("80", "90a"):
        _, programs = build(arch)
        names = readable(sorted(programs))
        for mangled in sorted(programs, key=names.get):
            name, is_own = names[mangled], names[mangled].startswith("sm90a::")
            kernel = programs[mangled].kernels[mangled]
            if is_own == (arch == "90a") and not is_copy(name, kernel, set(names.values())):
                found += mutants_of(arch, name, mangled, kernel)
    return found


def is_copy(name, kernel, names):
    """Is this kernel of a template that an earlier dtype stands for? Not where fp32 is multiplied:
    that is TF32, in tiles of its own."""
    multiplies = any(ins.op[0] == "mma" for ins in kernel.code)
    return any(
        start + later in name and name.replace(start + later, start + earlier) in names
        for i, later in enumerate(DTYPES)
        for earlier in DTYPES[:i]
        for start in "<,"
        if not (multiplies and later == "float")
    )


def mutants_of(arch, name, mangled, kernel):
    if not kernel.compiled:
        compile_kernel(kernel)
    multiplied = {
        register.strip()
        for ins in kernel.code
        if ins.op[0] == "mma"
        for operand in ins.operands[1:3]
        for register in operand.strip("{}").split(",")
    }
    sources = [o for ins in kernel.code for o in ins.operands[ins.op[0] not in NO_RESULT :]]
    read = {*re.findall(r"%\w+", " ".join(sources)), *(ins.guard for ins in kernel.code)}
    places, signs = {}, set()
    for at, ins in enumerate(kernel.code):
        result = ins.operands[0] if ins.operands else ""
        if ins.op[0] not in MEMORY and re.fullmatch(r"%\w+", result) and result not in read:
            continue
        if ins.op[0] == "shr" and (ins.operands[2] in ("31", "63") or ins.operands[1] in signs):
            signs.add(ins.operands[0])
            continue
        for kind in kinds_for(ins):
            if kind != "index" or ins.operands[0] not in multiplied:
                places.setdefault((ins.where, kind, ins.name), []).append(at)
    found = []
    for (where, kind, ins), copies in places.items():
        orders = kind == "drop" and not ins.startswith(MOVES)
        chosen = dict.fromkeys(copies if orders else (copies[0], copies[-1]))
        for number, at in enumerate(chosen, 1):
            which = f" {number}/{len(chosen)}" if len(chosen) > 1 else ""
            what = f"{name} {kind} {ins}{which}: {source_line(where)}"
            found.append(Mutant(arch, mangled, at, kind, where.rstrip(": "), what))
    return found


@functools.cache
def source_line(where):
    """The text behind "file:line: ", or where itself if that is not a file of ours."""
    file, _, line = where.rstrip(": ").rpartition(":")
    path = next((ROOT / "csrc").rglob(file), None) if file else None
    if path is None:
        return where.rstrip(": ")
    return f"{file} " + " ".join(path.read_text().splitlines()[int(line) - 1].split())
