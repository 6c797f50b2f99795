"""SASS, as nvdisasm prints it: loops of a kernel, what stands in them, registers of its parts."""

import re

COUNTED = {  # name: opcodes
    "hmma": ("HMMA", "HGMMA"), "ldsm": ("LDSM",), "ldgsts": ("LDGSTS",), "bar": ("BAR",),
    "depbar": ("LDGDEPBAR",),
}  # fmt: skip


def read_sass(text):
    """nvdisasm -c -> {mangled name: Code}."""
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.M)
    return {name: Code(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


class Code:
    """Instructions of one kernel: (whole opcode, operands, whether it runs always)."""

    def __init__(self, body):
        self.labels, self.code = {}, []
        for line in body.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                self.labels[label[1]] = len(self.code)
            elif found := re.match(
                r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z0-9_.a-z]+)(.*)", line
            ):
                self.code.append((found[2], found[3], not found[1]))
        self.ops = [op.split(".")[0] for op, _, _ in self.code]
        while self.ops and self._pads(len(self.ops) - 1):
            self.ops.pop()
            self.code.pop()

    def _pads(self, i):
        """Behind the end: nothing, or a jump to itself."""
        return self.ops[i] == "NOP" or (self.ops[i] == "BRA" and self.targets(i) == [i])

    def targets(self, i):
        return [self.labels[t] for t in re.findall(r"`\((\.L_x_\d+)\)", self.code[i][1])]

    def main_loops(self):
        """Slices: the innermost loops around tensor-core instructions, that which multiplies most
        last: kernels have others for tiles of fewer rows."""
        loops = [(a, b) for a, b in self._loops() if self._products(a, b)]
        inner = []
        for a, b in sorted(loops, key=lambda r: r[1] - r[0]):
            # not what holds another, nor a way back into one from code that stands far behind
            if all(b <= c or d <= a for c, d in inner):
                inner.append((a, b))
        return [slice(*r) for r in sorted(inner, key=lambda r: (self._products(*r), r[0] - r[1]))]

    def _loops(self):
        jumps = (
            (t, i + 1) for i, op in enumerate(self.ops) if op == "BRA" for t in self.targets(i)
        )
        return [(a, b) for a, b in jumps if a < b]

    def fetch_step(self):
        """Instructions of the smallest loop around so many copies as one step takes (sm_90a): what
        a fetching warp goes through at most."""
        around = [b - a for a, b in self._loops() if self.ops[a:b].count("LDGSTS") >= 16]
        return min(around, default=0)

    def _products(self, begin, end):
        return sum(op in COUNTED["hmma"] for op in self.ops[begin:end])

    def counts(self):
        """{sass: instructions in all, loop: of the main loop, and what COUNTED names in it}. Where
        a warpgroup of its own copies (sm_90a), copies are those of all the kernel."""
        main = self.ops[(self.main_loops() or [slice(0, 0)])[-1]]
        counts = {name: sum(op in ops for op in main) for name, ops in COUNTED.items()}
        if "HGMMA" in self.ops:
            counts |= {op.lower(): self.ops.count(op) for op in ("LDGSTS", "UTMALDG")}
        return {"sass": len(self.ops), "loop": len(main), **counts}

    def is_serialised(self):
        """ptxas has put a wait behind a wgmma where it could not tell who else needs its registers:
        a step's products then wait for each other. The kernels wait once a step."""
        return any(
            "HGMMA" in self.ops[loop]
            and sum(op.startswith("WARPGROUP.DEPBAR") for op, _, _ in self.code[loop]) != 1
            for loop in self.main_loops()
        )

    def roles(self):
        """Of each setmaxnreg, the smallest first: (registers that a thread has from there on,
        registers it uses)."""
        starts = [i for i, op in enumerate(self.ops) if op == "USETMAXREG"]
        return sorted(
            (int(self.code[i][1].strip(" ;").split()[-1], 16), self._registers(self._reached(i)))
            for i in starts
        )

    def _reached(self, start):
        """Every instruction that may run after this one."""
        seen, ahead = set(), [start]
        while ahead:
            i = ahead.pop()
            if i in seen or i >= len(self.ops):
                continue
            seen.add(i)
            ahead += self.targets(i)
            if not self._never_goes_on(i):
                ahead.append(i + 1)
        return seen

    def _never_goes_on(self, i):
        op, operands, always = self.code[i]
        jumps = op == "BRA" and operands.strip().startswith("`")  # not BRA.DIV, BRA.U !UP0
        return always and (jumps or op == "EXIT" or op.startswith("RET"))

    def _registers(self, instructions):
        return 1 + max(last_register(*self.code[i][:2]) for i in instructions)


def last_register(op, operands):
    """The highest register that an instruction names or reaches; -1 without any. A wide number
    takes those behind the named one."""
    if product := re.match(r"HGMMA\.64x(\d+)x", op):
        width = int(product[1]) // 2
    else:
        width = 4 if ".128" in op else 2 if re.search(r"\.(64|WIDE)", op) else 1
    last = -1
    for number, wide in re.findall(r"\bR(\d+)(\.64)?", re.sub(r"\[[^\]]*\]", "", operands)):
        last = max(last, int(number) + (2 if wide else width) - 1)
    for number, wide in re.findall(r"\[R(\d+)(?:\.\w+)*?(\.64)?[\]+.]", operands):
        last = max(last, int(number) + (1 if wide else 0))
    return last
