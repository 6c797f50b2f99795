"""What ptxas made of every kernel, held in machine_code.txt.

    python python_tests/cuda/machine_code.py            compares, says what differs
    python python_tests/cuda/machine_code.py --write    writes the table again

Columns: registers of a thread; static shared bytes (dynamic ones are not in the code); CTAs that
the registers and the static shared memory let one SM hold; stack and spilled bytes (must be 0);
SASS instructions in all. Then, of the main loop, that around the most tensor-core instructions
(sass.py), its instructions, and how many are HMMA (mma), LDSM (ldmatrix), LDGSTS (cp.async), BAR
and DEPBAR (waits for copies). A kernel without tensor-core instructions has zeros there. In kernels
of sm_90a one warpgroup copies and others multiply: hmma counts the HGMMA of their loop, ldgsts and
utmaldg (the copy engine, UTMALDG) those of all the kernel; step counts the instructions of the loop
that a fetching warp runs for a step; fetch and multiply are the registers
that either role uses, of those that setmaxnreg leaves it.
"""

import argparse
import functools
import pathlib
import re
import shutil
import subprocess
import sys

from nvcc import ROOT, alone, cache_folder, nvcc, sources_digest, version
from sass import read_sass

TABLE = pathlib.Path(__file__).with_suffix(".txt")
ARCHITECTURES = ("80", "86", "89", "90", "90a", "100", "120")
WHEEL = "nvidia-cuda-nvdisasm==13.5.37"
COLUMNS = (
    "arch", "registers", "shared", "ctas", "stack", "spills", "sass",
    "loop", "hmma", "ldsm", "ldgsts", "bar", "depbar",
)  # fmt: skip
HOPPER_COLUMNS = ("utmaldg", "step", "fetch", "multiply")
# registers, threads and shared bytes of one SM; a CTA's shared memory costs 1 KiB more
SM = {"80": (65536, 2048, 164), "86": (65536, 1536, 100), "89": (65536, 1536, 100),
      "90": (65536, 2048, 228), "90a": (65536, 2048, 228), "100": (65536, 2048, 228),
      "120": (65536, 1536, 100)}  # fmt: skip


@functools.cache
def nvdisasm():
    """Path of nvdisasm: PATH, or its wheel, installed into the cache folder."""
    if found := shutil.which("nvdisasm"):
        return found
    target = cache_folder() / WHEEL.replace("==", "-")
    path = target / "nvidia/cu13/bin/nvdisasm"
    with alone(target.name):
        if not path.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
            done = subprocess.run(
                [*command, "--target", str(target), WHEEL], capture_output=True, text=True
            )
            if not path.exists():
                raise RuntimeError(f"Installing {WHEEL} failed: {done.stderr.strip()[-300:]}")
    return str(path)


def assemble(source, arch):
    """(what ptxas reports, SASS) of one .cu file for one architecture."""
    key = sources_digest(arch, source.name)
    beside = cache_folder() / f"{source.stem}-{arch}-{key}"
    report, code = beside.with_suffix(".ptxas"), beside.with_suffix(".sass")
    with alone(beside.name):
        if not code.exists():
            cubin = beside.with_suffix(".cubin")
            command = [nvcc(), "-std=c++17", "-I", str(ROOT / "csrc"), "-cubin", f"-arch=sm_{arch}"]
            command += ["-Xptxas", "-v", "-o", str(cubin), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            report.write_text(done.stdout + done.stderr)
            sass = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True)
            if sass.returncode:
                raise RuntimeError(sass.stderr)
            code.write_text(sass.stdout)
    return report.read_text(), code.read_text()


def readable(names):
    """Mangled names -> as in the source, without namespaces and parameters."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    out = {}
    for mangled, name in zip(names, text.splitlines(), strict=True):
        name = re.sub(r"\(anonymous namespace\)::|dsmoe::cuda::|dsmoe::|__nv_|^void ", "", name)
        out[mangled] = name[: _end_of_name(name)].replace(" ", "")
    return out


def _end_of_name(name):
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return i
    return len(name)


def read_report(text):
    """ptxas -v -> {mangled name: {registers, shared, stack, spills}}."""
    found = {}
    pattern = (
        r"Compiling entry function '([^']+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    for name, stack, stores, loads, registers, rest in re.findall(pattern, text, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = {
            "registers": int(registers), "shared": int(shared[1]) if shared else 0,
            "stack": int(stack), "spills": int(stores) + int(loads),
        }  # fmt: skip
    return found


def ctas_per_sm(arch, threads, registers, shared):
    """CTAs that an SM holds at once, by registers (given to warps in eights), threads, memory."""
    of_sm, most_threads, kib = SM[arch]
    by_registers = of_sm // (-(-registers // 8) * 8 * threads)
    return min(by_registers, most_threads // threads, kib * 1024 // (shared + 1024), 32)


def threads_of(source, arch):
    """{mangled name: threads}, from .maxntid in the PTX; the hash in names is dropped."""
    from nvcc import ptx

    text = ptx(source, arch)
    found = re.findall(r"\.entry\s+([\w$]+)\s*\([^)]*\)\s*\.maxntid\s+(\d+)", text)
    return {_without_hash(name): int(n) for name, n in found}


def _without_hash(name):
    return re.sub(r"_GLOBAL__N__\w{8}_\d+_\w+?_cu_\w{8}", "", name)


def measure(architectures=ARCHITECTURES):
    """Rows of the table, one per kernel and architecture: [(file, kernel, {column: value})]."""
    rows = []
    for source in sorted((ROOT / "csrc" / "cuda").rglob("*.cu")):
        own = source.parent.name == "sm90a"
        threads = threads_of(source, "sm_90a" if own else "sm_80")
        for arch in architectures:
            if own != (arch == "90a"):
                continue
            report, sass = assemble(source, arch)
            if "serialized" in report:
                raise RuntimeError(f"ptxas makes wgmmas of {source.name} wait: {report}")
            report, sass = read_report(report), read_sass(sass)
            for mangled, name in readable(sorted(report)).items():
                code = sass[mangled]
                row = {"arch": arch, **report[mangled], **code.counts()}
                if roles := code.roles():
                    row["is_serialised"] = code.is_serialised()
                    row["step"] = code.fetch_step()
                    row["fetch"], row["multiply"] = (f"{used}/{left}" for left, used in roles)
                limit = threads.get(_without_hash(mangled))
                row["ctas"] = (
                    ctas_per_sm(arch, limit, row["registers"], row["shared"]) if limit else 0
                )
                rows.append((source.name, name, row))
    return sorted(rows, key=lambda r: (r[0], r[1], ARCHITECTURES.index(r[2]["arch"])))


def to_text(rows):
    """The table as it is committed."""
    lines = [f"# {__doc__.splitlines()[0]} See machine_code.py. nvcc {version(nvcc())}"]
    previous = None
    for file, name, row in rows:
        columns = [*COLUMNS, *(HOPPER_COLUMNS if "fetch" in row else ())]
        if (file, name) != previous:
            lines += ["", f"{file}: {name}", "".join(f"{c:>10}" for c in columns)]
            previous = (file, name)
        lines.append("".join(f"{row[c]:>10}" for c in columns))
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table again")
    arguments = parser.parse_args()
    rows = measure()
    for file, name, row in rows:
        if row["stack"] or row["spills"]:
            print(f"{file}: {name} for sm_{row['arch']} spills or has a stack")
    text = to_text(rows)
    if arguments.write:
        TABLE.write_text(text)
        return 0
    if same := text == TABLE.read_text():
        print(f"{len(rows)} rows agree")
    else:
        import difflib

        print("\n".join(difflib.unified_diff(TABLE.read_text().splitlines(), text.splitlines())))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
