"""torch.ops.dsmoe of CPU tensors through the bindings' CUDA branch, the launchers and the
interpreter: what Python does on a GPU, from DSMoEFFN to a LLaMA, runs as it is where there is none.

csrc/binding is compiled unchanged and linked with bindings/fake_torch.cpp, which says of every
tensor that it is on CUDA. Its ops stand in a namespace of their own, and cuda_kernels() puts them
in the place of the installed package's CPU ops for a while. Kernels read and write torch's own
memory: an op's arguments they may only read, what the bindings allocate they must write before they
read it, and nothing else exists for them.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import warnings

import numpy as np
import torch
from interpreted import HERE, STREAM, Interpreter, build
from nvcc import ROOT, alone, cache_folder
from ptx.memory import BadAccess, Buffer, GlobalMemory

OPS = (
    "route",
    "route_backward",
    "router",
    "router_backward",
    "permute",
    "expert_mlp",
    "expert_mlp_backward",
    "expert_mlp_packed",
    "expert_mlp_quantized",
    "pack_weights",
    "routed_ffn",
)


class Hooks(ctypes.Structure):
    _fields_ = [
        ("made", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)),
        ("stream", ctypes.c_void_p),
    ]


@functools.cache
def bindings(arch):
    """(library, its ops) of csrc/binding, linked with the launchers for one compute capability."""
    launchers, _ = build(arch)
    torch_folder = os.path.dirname(torch.__file__)
    namespace = f"dsmoe_on_cuda_{arch}"
    sources = sorted((ROOT / "csrc" / "binding").glob("*.cpp"))
    sources = [s for s in sources if s.name != "module.cpp"] + sorted(HERE.glob("bindings/*.cpp"))
    command = [
        "c++", "-shared", "-fPIC", "-std=c++20", "-O1", "-fvisibility=hidden", "-Wl,-Bsymbolic",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DDSMOE_WITH_CUDA",
        f'-DNAMESPACE="{namespace}"', "-I", str(ROOT / "csrc"),
        "-isystem", f"{torch_folder}/include", *map(str, sources), launchers._name,
        *(f"{torch_folder}/lib/{name}" for name in ("libtorch_cpu.so", "libc10.so")),
    ]  # fmt: skip
    headers = [ROOT / "csrc/kernels.h", *ROOT.glob("csrc/*/*.h")]
    digest = hashlib.sha256(" ".join([torch.__version__, *command]).encode())
    for path in [*sources, *sorted(headers)]:
        digest.update(path.read_bytes())
    path = cache_folder() / f"bindings-{digest.hexdigest()[:24]}.so"
    with alone(path.name):
        if not path.exists():
            beside = path.with_name(f"{path.name}.{os.getpid()}")
            subprocess.run([*command, "-o", str(beside)], check=True)
            beside.rename(path)
    return ctypes.CDLL(str(path)), getattr(torch.ops, namespace)


class HostMemory(GlobalMemory):
    """Buffers where torch has them: an address is the host's own."""

    def __init__(self):
        super().__init__()
        self.starts = np.zeros(0, np.uint64)  # of the buffers, ascending
        self.given = set()  # starts of those that outlive the op

    def give(self, tensor):
        """Kernels may read all of the tensor's storage."""
        storage = tensor.untyped_storage()
        self.place(storage.data_ptr(), storage.nbytes(), writable=False)
        if storage.nbytes():
            self.given.add(storage.data_ptr())

    def place(self, start, size, writable):
        """Kernels may read this memory; if writable, also write it, but read only what they wrote.

        What was there before was freed, unless it is an argument, of which this is a view.
        """
        if size == 0:
            return
        below = [b for b in self.buffers.values() if b.address + b.bytes.size <= start]
        above = [b for b in self.buffers.values() if b.address >= start + size]
        if self.given - {b.address for b in below + above}:
            return
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
        if writable:
            array[:] = 0xFF
        new = Buffer(start, array, initialised=not writable, writable=writable)
        self.buffers = dict(enumerate([*below, new, *above]))
        self.starts = np.array([b.address for b in self.buffers.values()], np.uint64)

    def _locate(self, address):
        number = np.searchsorted(self.starts, address, side="right").astype(np.int64) - 1
        if (number < 0).any():
            raise BadAccess(f"wild global address {int(address[number < 0][0]):#x}")
        return number, (address - self.starts[number]).astype(np.int64)


class CudaOps(Interpreter):
    """The ops of one compute capability as functions of CPU tensors; what they do on a device is
    interpreted."""

    def __init__(self, arch="80", **options):
        super().__init__(arch=arch, **options)
        self.bindings, self.ops = bindings(arch)

    def call(self, op, *args):
        self._begin()
        memory = self.device.memory = HostMemory()
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                memory.give(tensor)
        made = dict(Hooks._fields_)["made"](lambda *where: memory.place(*where))
        hooks = Hooks(made, STREAM)
        self.bindings.set_hooks(ctypes.byref(hooks))
        try:
            results = getattr(self.ops, op)(*args)
        except RuntimeError as error:
            raise (self.problem or error) from None
        if self.problem:
            raise self.problem
        return results


@contextlib.contextmanager
def cuda_kernels(arch="80", **options):
    """Inside, torch.ops.dsmoe of CPU tensors is what it is of CUDA tensors on a GPU."""
    ops = CudaOps(arch, **options)
    library = torch.library.Library("dsmoe", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for op in OPS:
                library.impl(op, functools.partial(ops.call, op), "CPU", allow_override=True)
        yield ops
    finally:
        library._destroy()
