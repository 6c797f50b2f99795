"""PTX text -> a Program per kernel: instructions, labels, parameters, shared symbols, registers."""

import re
from dataclasses import dataclass, field

from .numbers import TYPES


@dataclass
class Instruction:
    op: list[str]  # the dotted name, split: ["add", "s32"]
    operands: list[str]
    guard: str | None  # predicate register, None = always
    negate: bool
    where: str  # "file:line: ", from nvcc -lineinfo
    is_target: bool = False  # a label stands before it
    run: object = None  # filled by machine.compile_program
    group_wide: bool = False  # a whole warpgroup executes it together
    touches: tuple = ()  # registers of a wgmma that it reads or writes

    @property
    def name(self):
        return ".".join(self.op)


@dataclass
class Kernel:
    name: str
    params: dict = field(default_factory=dict)  # name -> (offset, bytes)
    param_bytes: int = 0
    shared: dict = field(default_factory=dict)  # symbol -> offset in static shared memory
    shared_bytes: int = 0
    dynamic: set = field(default_factory=set)  # names of extern shared arrays
    registers: dict = field(default_factory=dict)  # name -> (index, numpy dtype)
    code: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    max_threads: int | None = None
    compiled: bool = False


class Program:
    """All kernels of one PTX module, by their (mangled) entry names."""

    def __init__(self, text):
        # debug sections and comments mean nothing to us
        text = re.sub(r"\.section[^{]*\{[^}]*\}", "", text)
        text = re.sub(r"//[^\n]*", "", text).replace("shared::cta", "shared")
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
        self.kernels = {}
        for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
            end, depth = m.end(), 1
            while depth:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            kernel = Kernel(m[1])
            kernel.dynamic = set(re.findall(r"\.extern\s+\.shared[^;]*?\s(\w+)\[\]", text))
            self._parameters(kernel, m[2])
            limit = re.search(r"\.maxntid\s+(\d+)\s*,?\s*(\d*)\s*,?\s*(\d*)", m[3])
            if limit:
                kernel.max_threads = int(limit[1]) * int(limit[2] or 1) * int(limit[3] or 1)
            self._shared(kernel, text[: text.find(".entry")])
            self._body(kernel, text[m.end() : end - 1])
            self.kernels[m[1]] = kernel

    def find(self, name):
        """The kernel whose entry name is, or contains, this name."""
        if name in self.kernels:
            return self.kernels[name]
        found = [k for k in self.kernels if name in k]
        if len(found) != 1:
            raise KeyError(f"{len(found)} kernels match {name!r} among {sorted(self.kernels)}")
        return self.kernels[found[0]]

    @staticmethod
    def _parameters(kernel, text):
        pattern = (
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s[^,\[]*?)?"
            r"(\w+)(?:\[(\d+)\])?\s*(?:,|$)"
        )
        at = 0
        for align, kind, name, count in re.findall(pattern, text.strip() + "\n", re.M):
            size = TYPES[kind].itemsize
            step = int(align or size)
            at = -(-at // step) * step
            kernel.params[name] = (at, size * int(count or 1))
            at += size * int(count or 1)
        kernel.param_bytes = at

    @staticmethod
    def _shared(kernel, text):
        for align, kind, name, count in re.findall(
            r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(\w+)(?:\[(\d+)\])?\s*;", text
        ):
            size = TYPES[kind].itemsize
            step = int(align or size)
            kernel.shared_bytes = -(-kernel.shared_bytes // step) * step
            kernel.shared[name] = kernel.shared_bytes
            kernel.shared_bytes += size * int(count or 1)

    def _body(self, kernel, body):
        Program._shared(kernel, body)
        if re.search(r"\.local\s", body):
            # a register array that is indexed at run time, or a spill: slow on the device as well
            raise ValueError(f"{kernel.name} uses local memory")
        # blocks may declare registers of their own: give each block's names a prefix
        body = self._rename_scoped(body)
        for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
            dtype = TYPES[kind] if kind == "pred" else TYPES[f"b{TYPES[kind].itemsize * 8}"]
            for name in names.split(","):
                base, _, count = name.strip().partition("<")
                all_names = [f"{base}{i}" for i in range(int(count[:-1]))] if count else [base]
                for n in all_names:
                    kernel.registers[n] = (len(kernel.registers), dtype)
        where, pending = "", False
        for raw in re.split(r";|(?<=:)\s*\n", body):
            s = re.sub(r"^[{}\s]+", "", raw.strip())
            while loc := re.match(r"\.loc\s+(\d+)\s+(\d+)[^\n]*\n?\s*", s + "\n"):
                if loc[2] != "0":  # line 0 marks code that the compiler made up
                    where = f"{self.files.get(loc[1], loc[1]).rsplit('/', 1)[-1]}:{loc[2]}: "
                s = re.sub(r"^[{}\s]+", "", s[loc.end() :])
            while label := re.match(r"([$\w]+):\s*", s):
                kernel.labels[label[1]] = len(kernel.code)
                pending = True
                s = s[label.end() :]
            if not s or s.startswith("."):
                continue
            g = re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", s, re.S)
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", g[4])
            kernel.code.append(
                Instruction(g[3].split("."), operands, g[2], g[1] == "!", where, pending)
            )
            pending = False

    @staticmethod
    def _rename_scoped(body):
        out, stack, serial = [], [], 0
        parts = re.split(r"([{}])", body)
        for part, following in zip(parts, [*parts[1:], ""], strict=True):
            declares = following.lstrip().startswith(".reg")  # a .loc line may stand before it
            if part == "{" and (declares or not re.search(r"[\w,]\s*$", "".join(out[-1:]))):
                serial += 1
                stack.append((serial, {}))
                out.append(part)
            elif part == "{":
                stack.append(None)  # a vector operand
                out.append(part)
            elif part == "}" and stack:
                out.append(part)
                stack.pop()
            else:
                scope = next((s for s in reversed(stack) if s), None)
                if scope:
                    for name in re.findall(r"\.reg\s+\.\w+\s+(%?\w+)\s*;", part):
                        scope[1][name] = f"%scope{scope[0]}_{name.lstrip('%')}"
                    for name, new in scope[1].items():  # of which %p1 may hide the function's
                        part = re.sub(rf"(?<![\w.%$]){name}(?!\w)", new, part)
                out.append(part)
        return "".join(out)
