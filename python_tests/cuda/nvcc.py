"""Finds the pinned nvcc, or installs its wheels; compiles kernels once per content."""

import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
VERSION = "13.0.88"


def cache_folder():
    base = (
        os.environ.get("DSMOE_TEST_CACHE")
        or pathlib.Path(tempfile.gettempdir()) / f"dsmoe_cuda_{os.getuid()}"
    )
    folder = pathlib.Path(base)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def alone(name):
    """One process at a time writes what the cache folder holds under this name."""
    with open(cache_folder() / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def nvcc():
    """Path of nvcc: CUDACXX if it is set; else the version that WHEELS pins, from PATH, from this
    Python's packages, or installed into the cache folder."""
    if named := os.environ.get("CUDACXX"):
        return named
    with alone("toolkit"):
        return find_or_install()


def find_or_install():
    target = cache_folder() / "toolkit"
    folders = [folder / "nvidia/cu13/bin" for folder in (*map(pathlib.Path, sys.path), target)]
    for folder in (None, *map(str, folders)):
        if (path := shutil.which("nvcc", path=folder)) and version(path) == VERSION:
            return path
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, *WHEELS], capture_output=True, text=True)
    path = target / "nvidia/cu13/bin/nvcc"
    if done.returncode or not path.exists():
        raise RuntimeError(
            f"The CUDA tests compile kernels with nvcc {VERSION}, which is not here: run `pip "
            f"install {' '.join(WHEELS)}`, or name another nvcc in CUDACXX (pip said: "
            f"{done.stderr.strip()[-300:]})."
        )
    return str(path)


@functools.cache
def version(path):
    """Such as "13.0.88"."""
    output = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", output)
    return found[1] if found else "unknown"


def sources_digest(*extra):
    """Changes with any file that a kernel could include, and with the compiler."""
    digest = hashlib.sha256("\0".join([version(nvcc()), *extra]).encode())
    csrc, here = ROOT / "csrc", pathlib.Path(__file__).parent
    files = [*(csrc / "cuda").rglob("*"), *(csrc / "common").rglob("*"), *here.glob("*")]
    files = [p for p in files if p.suffix in (".cu", ".cuh", ".h", ".cpp")]
    files = sorted([*files, csrc / "kernels.h"])
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def compile_cached(output_suffix, flags, sources):
    """Runs nvcc unless the same sources were compiled before; returns the output's path."""
    key = sources_digest(*flags, *map(str, sources))
    path = cache_folder() / f"{pathlib.Path(sources[0]).stem}-{key}{output_suffix}"
    if not path.exists():
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        command = [
            nvcc(),
            "-std=c++17",
            "-I",
            str(ROOT / "csrc"),
            *flags,
            "-o",
            str(beside),
            *map(str, sources),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        beside.rename(path)
    return path


def ptx(source, arch="sm_80", *flags):
    """PTX text of one .cu file."""
    return compile_cached(
        ".ptx", ["-ptx", f"-arch={arch}", "-lineinfo", *flags], [source]
    ).read_text()
