"""Building and importing where something is missing: one clear sentence, and no crash."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import dsmoe_ext

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent


def build(tmp_path, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path / "t")]
    command += ["--build-lib", str(tmp_path / "lib")]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"DSMOE_TORCH_DIR": "/nonexistent"}, "there is none in /nonexistent"),
        ({"CXX": "no-such-compiler"}, "needs a C++20 compiler"),
        ({"DSMOE_CUDA": "yes"}, "DSMOE_CUDA must be auto, 1 or 0, but is 'yes'"),
        ({"DSMOE_CUDA": "1", "CUDACXX": "no-such-nvcc"}, "DSMOE_CUDA=1 needs nvcc"),
    ],
)
def test_build_says_what_is_missing(environment, message, tmp_path):
    result = build(tmp_path, **environment)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "lib").exists()


def test_source_distribution_holds_what_is_built(tmp_path):
    """All that CMake compiles, and the tests; nothing that was compiled."""
    pytest.importorskip("setuptools", "77")
    skipped = shutil.ignore_patterns("build", "*.egg-info", ".*", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=skipped)
    code = "import setuptools.build_meta as b; b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "source", check=True)
    [archive] = (tmp_path / "source/dist").iterdir()
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"}
    for folder in ("csrc", "dsmoe_ext", "python_tests", "docs"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        wanted |= {str(path.relative_to(ROOT)) for path in files}
    compiled = {name for name in wanted if name.endswith((".so", ".pyc"))}
    assert wanted - compiled <= packed, sorted(wanted - compiled - packed)
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


def run_python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


def test_old_torch_is_refused_at_import(tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1'\n")
    result = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import dsmoe_ext", cwd=tmp_path
    )
    assert "dsmoe_ext needs torch 2.10 or newer, but torch is 2.9.1" in result.stderr


def test_source_folder_is_not_the_package():
    result = run_python("import dsmoe_ext", cwd=ROOT)
    assert "is the source folder of dsmoe_ext and holds no compiled part" in result.stderr


def test_unknown_isa_is_refused_at_import(tmp_path):
    environment = {**os.environ, "DSMOE_ISA": "sse9"}
    result = run_python("import dsmoe_ext", cwd=tmp_path, env=environment)
    assert "cannot run ISA 'sse9'; use one of: " in result.stderr


def test_kept_bytes_that_are_no_number_are_refused_at_import(tmp_path):
    environment = {**os.environ, "DSMOE_KEPT_BYTES": "512M"}
    result = run_python("import dsmoe_ext", cwd=tmp_path, env=environment)
    assert "DSMOE_KEPT_BYTES must be a whole number of bytes" in result.stderr


def test_build_info():
    info = dsmoe_ext.build_info()
    assert info["version"] == dsmoe_ext.__version__
    assert info["isa"] == info["isas"][0] and info["isas"][-1] == "portable"
    assert info["torch"].split(".")[0] == torch.__version__.split(".")[0]


REFUSE_TILES = """
import ctypes, runpy, struct
filter = b"".join(struct.pack("HBBI", *instruction) for instruction in [
    (0x20, 0, 0, 0), (0x15, 0, 3, 158),  # the system call is arch_prctl
    (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023),  # and its argument ARCH_REQ_XCOMP_PERM:
    (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)])  # "not permitted"; all else is allowed
filter = ctypes.create_string_buffer(filter)
program = struct.pack("HxxxxxxP", 6, ctypes.addressof(filter))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
runpy.run_module("dsmoe_ext", run_name="__main__")
"""


@pytest.mark.skipif("amx_bf16" not in dsmoe_ext.build_info()["isas"], reason="no AMX here")
def test_diagnosis_names_tiles_that_the_system_refuses(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "DSMOE_ISA"}
    result = run_python(REFUSE_TILES, cwd=tmp_path, env=environment)
    assert "amx           refused by the system (Operation not permitted)" in result.stdout
    isas = [isa for isa in dsmoe_ext.build_info()["isas"] if isa != "amx_bf16"]
    assert f"isas          {isas}" in result.stdout
    assert f"isa           {isas[0]}" in result.stdout
    assert "self-test     ok" in result.stdout


def test_import_needs_no_transformers(tmp_path):
    code = "import sys, dsmoe_ext; print([m for m in sys.modules if m == 'transformers'])"
    assert run_python(code, cwd=tmp_path).stdout.strip() == "[]"
