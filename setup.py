"""Builds the C++ extension with CMake against the installed torch; the rest is in pyproject.toml.

DSMOE_TORCH_DIR            folder of the torch package, where the build cannot find it by itself
DSMOE_CUDA=auto|1|0        CUDA kernels; auto (default): if torch is a CUDA build and nvcc is found
CUDACXX                    nvcc, if it is neither on PATH nor in wheels beside torch
CMAKE_CUDA_ARCHITECTURES   such as "80;90a";  MAX_JOBS  compiler processes at once
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_places() -> list[Path]:
    """Where torch may be: named, or importable, or outside of pip's isolated environment."""
    spec = importlib.util.find_spec("torch")
    places = [Path(sysconfig.get_path("purelib")) / "torch"]
    if spec is not None:
        places.insert(0, Path(spec.origin).parent)
    if os.environ.get("DSMOE_TORCH_DIR"):
        places = [Path(os.environ["DSMOE_TORCH_DIR"])]
    return places


def torch_dir() -> Path:
    for place in torch_places():
        if (place / "include/torch/csrc/stable/library.h").exists():
            return place
    sys.exit(
        "dsmoe_ext builds against an installed torch 2.10 or newer; there is none in "
        f"{torch_places()[0]}. "
        "Run `pip install torch==2.13.0` first; if torch is elsewhere (uv, python -m build), set "
        "DSMOE_TORCH_DIR to its folder or install with --no-build-isolation."
    )


def cuda_compiler() -> str:
    """Path of nvcc, or "" for a build without CUDA."""
    choice = os.environ.get("DSMOE_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        sys.exit(f"DSMOE_CUDA must be auto, 1 or 0, but is {choice!r}.")
    has_cuda = any((place / "lib/libtorch_cuda.so").exists() for place in torch_places())
    if choice == "0" or (choice == "auto" and not has_cuda):
        return ""
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    for place in torch_places() if nvcc is None else []:  # NVIDIA's wheels lie beside torch
        nvcc = nvcc or next(map(str, place.parent.glob("nvidia/cu*/bin/nvcc")), None)
    if nvcc is None and choice == "1":
        sys.exit(
            "DSMOE_CUDA=1 needs nvcc (CUDA 12.8 or newer), and there is none: put it on PATH, name "
            "it in CUDACXX, install the wheels `nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm "
            "nvidia-cuda-runtime nvidia-cuda-cccl`, or build for the CPU with DSMOE_CUDA=0."
        )
    return nvcc or ""


def version_label() -> str:
    """ "+cu130" if the CUDA kernels are built: pip hides the build's own words, but not this."""
    if "sdist" in sys.argv or not (nvcc := cuda_compiler()):
        return ""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    return f"+cu{release[1]}{release[2]}" if release else "+cuda"


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            sys.exit("dsmoe_ext needs a C++20 compiler (GCC 11, Clang 14 or newer): install g++.")
        torch, out = torch_dir(), Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        nvcc, architectures = cuda_compiler(), os.environ.get("CMAKE_CUDA_ARCHITECTURES")
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", self.build_temp,
            # Named every time: an earlier isolated build left the path of a ninja that is gone.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-DDSMOE_TORCH_DIR={torch}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDSMOE_VERSION={self.distribution.get_version()}",
            f"-DDSMOE_CUDA={int(bool(nvcc))}", *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            f"-DCMAKE_INSTALL_PREFIX={out.parent}",
            *([f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"] if architectures else []),
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (
            configure,
            ["cmake", "--build", self.build_temp, "-j", jobs, "--target", "install"],
        ):
            if subprocess.run(command).returncode:
                sys.exit(
                    f"dsmoe_ext: `{' '.join(command[:3])} ...` failed; the reason stands above."
                )


setup(
    ext_modules=[Extension("dsmoe_ext._C", [])],
    cmdclass={"build_ext": CMakeBuild},
    options={"egg_info": {"tag_build": version_label()}},
)
