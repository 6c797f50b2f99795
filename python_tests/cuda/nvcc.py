"""Finds nvcc, or installs the pinned wheels of it; compiles kernels once per content."""

import functools
import hashlib
import os
import pathlib
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


def cache_folder():
    base = (
        os.environ.get("DSMOE_TEST_CACHE")
        or pathlib.Path(tempfile.gettempdir()) / f"dsmoe_cuda_{os.getuid()}"
    )
    folder = pathlib.Path(base)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def nvcc():
    """Path of nvcc: CUDACXX, PATH, the wheels in this Python, or the wheels installed into the
    cache folder."""
    for found in (os.environ.get("CUDACXX"), shutil.which("nvcc")):
        if found:
            return found
    target = cache_folder() / "toolkit"
    for folder in (*map(pathlib.Path, sys.path), target):
        if (path := folder / "nvidia/cu13/bin/nvcc").exists():
            return str(path)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(target),
        *WHEELS,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    path = target / "nvidia/cu13/bin/nvcc"
    if done.returncode or not path.exists():
        raise RuntimeError(
            "The CUDA tests compile kernels, and there is no nvcc: put CUDA 13's nvcc on PATH, or "
            f"set CUDACXX, or let pip reach PyPI (installing {' '.join(WHEELS)} failed: "
            f"{done.stderr.strip()[-300:]})"
        )
    return str(path)


def sources_digest(*extra):
    """Changes with any file that a kernel could include."""
    digest = hashlib.sha256("\0".join(extra).encode())
    csrc = ROOT / "csrc"
    folders = [csrc / "cuda", csrc / "common", pathlib.Path(__file__).parent]
    files = [p for f in folders for p in f.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp")]
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
