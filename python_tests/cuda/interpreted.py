"""The CUDA ops on the interpreter: csrc/cuda compiled to host code and PTX, its launchers run as
they are.

The functions take and return torch tensors on the CPU, like dsmoe_ext.ops. Kernels may only read
their inputs, and outputs and workspaces start uninitialised.
"""

import collections
import ctypes
import functools
import pathlib
import subprocess

import numpy as np
import pytest
import torch
from nvcc import ROOT, alone, cache_folder, nvcc, sources_digest
from params import DTYPE, METHOD, STATUS, STRUCTS, Settings
from ptx import Device, Program
from tensors import ACTIVATION, KIND, NUMPY, to_numpy, to_torch

from dsmoe_ext.cuda_settings import PATHS, CudaSettings

HERE = pathlib.Path(__file__).parent


# few tokens and tiles are already many: they go in several passes, or a warp each
SMALL = dict(workspace_mib=1, router_tiles=16, group=128)
STREAM = 0x57AE  # what the launchers are told to use; never dereferenced


class Failed(RuntimeError):
    """A launcher returned a status other than kOk."""


class Callbacks(ctypes.Structure):
    _fields_ = [
        (
            "launch",
            ctypes.CFUNCTYPE(
                ctypes.c_int,
                ctypes.c_char_p,
                *[ctypes.POINTER(ctypes.c_uint)] * 2,
                ctypes.c_size_t,
                ctypes.POINTER(ctypes.c_void_p),
            ),
        ),
        ("memset", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t)),
        ("call", ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)),
        ("multiprocessors", ctypes.c_int),
        ("capability", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    ]


@functools.cache
def build(arch):
    """(shared library of the launchers, {kernel name: Program}) for one compute capability."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if arch == "90a":
        sources += sorted((ROOT / "csrc" / "cuda" / "sm90a").glob("*.cu"))
    folder = cache_folder() / f"kernels_{arch}_{sources_digest(arch)}"
    with alone(folder.name):
        if not (folder / "done").exists():
            compile_launchers(sources, arch, folder)
    programs = [Program((folder / f"{s.stem}.ptx").read_text()) for s in sources]
    return ctypes.CDLL(str(folder / "launchers.so")), {k: p for p in programs for k in p.kernels}


def compile_launchers(sources, arch, folder):
    """Into folder: launchers.so, the PTX of every source, and a file "done"."""
    folder.mkdir(exist_ok=True)
    flags = ["-std=c++17", "-lineinfo", "-I", str(ROOT / "csrc")]
    flags += [f"-arch=compute_{arch}", f"-code=compute_{arch}"]
    flags += ["-Xcompiler", "-fPIC", "-cudart", "none", "--keep", "--keep-dir", str(folder)]
    flags += ["-DDSMOE_SM90A"] if arch == "90a" else []
    command = [nvcc(), "-shared", *flags, "-o", str(folder / "launchers.so"), *map(str, sources)]
    command += [str(HERE / "fake_runtime.cpp"), str(ROOT / "csrc" / "common" / "status.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # once is enough for the whole session
        pytest.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}", returncode=1)
    (folder / "done").touch()


class Interpreter:
    """dsmoe_ext's CUDA ops, interpreted. seed: a wild schedule; counters: see ptx.Counters;
    settings: those of dsmoe_ext.cuda_settings."""

    def __init__(self, seed=None, counters=None, arch="80", multiprocessors=2, **settings):
        self.library, self.programs = build(arch)
        self.settings = CudaSettings(**settings)
        self.seed, self.counters, self.multiprocessors = seed, counters, multiprocessors
        self.arch, self.activation = arch, "silu"
        self.capability = int(arch.rstrip("a"))
        self.launches = []  # (kernel, grid, block, shared bytes, bytes of the parameters)
        self.boxes = collections.Counter()  # of the copy engine, by kernel, if there are counters
        self.calls = []  # of the CUDA runtime: (function, stream or None)

    # -- the device side --

    def _begin(self):
        self.device, self.problem = Device(self.seed, self.counters), None
        kinds = dict(Callbacks._fields_)
        self._callbacks = Callbacks(  # must outlive the calls
            kinds["launch"](self._noting_problems(self._launch)),
            kinds["memset"](self._noting_problems(self._memset)),
            kinds["call"](lambda name, stream: self.calls.append((name.decode(), stream))),
            self.multiprocessors,
            self.capability,
            STREAM,
        )
        self.library.set_callbacks(ctypes.byref(self._callbacks))
        self._set_settings(self.settings)
        self.library.take_settings()

    def _set_settings(self, s):
        workspace = int(s.workspace_mib * 2**20)
        given = Settings(workspace, s.group, s.router_tiles, s.sms, PATHS.index(s.path), s.parts)
        self.library.set_settings(ctypes.byref(given))

    def _noting_problems(self, function):
        """Exceptions cannot pass through C: _run raises them again."""

        def call(*args):
            try:
                function(*args)
            except Exception as error:
                self.problem = self.problem or error
                return 1
            return 0

        return call

    def _launch(self, name, grid, block, shared, args):
        name = name.decode()
        grid, block = tuple(grid[0:3]), tuple(block[0:3])
        kernel = self.programs[name].kernels[name]
        data = bytearray(kernel.param_bytes)
        for i, (offset, size) in enumerate(kernel.params.values()):
            data[offset : offset + size] = ctypes.string_at(args[i], size)
        self.launches.append((name, grid, block, shared, bytes(data)))
        before = self.counters.boxes if self.counters else 0
        self.device.launch(self.programs[name], name, grid, block, shared, param_bytes=data)
        if self.counters:
            self.boxes[name] += self.counters.boxes - before

    def _memset(self, address, value, count):
        self.device.memory.fill(address, value, count)

    def _run(self, entry, params, workspace=None):
        status = getattr(self.library, entry)(ctypes.byref(params), ctypes.c_void_p(workspace))
        if self.problem:
            raise self.problem
        if status:
            raise Failed(next(k for k, v in STATUS.items() if v == status))

    def _in(self, tensor):
        """Address of a read-only copy; also remembers nothing of the tensor."""
        return self.device.array(to_numpy(tensor)).address

    def _out(self, shape, dtype):
        return self.device.empty(shape, NUMPY.get(dtype, np.int32))

    def _workspace(self, entry, params):
        self.workspace_bytes = self._workspace_bytes(entry, params)
        return self.device.empty(self.workspace_bytes, np.uint8).address

    def launch(self, kernel, grid, block, arguments, size):
        """One kernel(arguments.., output float32 [size]) alone; returns the output."""
        self._begin()
        out = self._out(size, torch.float32)
        values = [self._in(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        held = [ctypes.c_int64(v) for v in (*values, out.address)]
        args = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        (name,) = (n for n in self.programs if kernel in n)
        self._launch(name.encode(), (grid, 1, 1), (block, 1, 1), 0, args)
        return torch.from_numpy(out.array.copy())

    # -- the ops --

    def _router_params(self, x, weight, bias=None):
        p = STRUCTS["RouterParams"](DTYPE[KIND[x.dtype]], *x.shape, len(weight))
        (p.x, p.x_stride), p.weight = self._rows(x), self._in(weight)
        p.bias = 0 if bias is None else self._in(bias)
        return p

    def router(self, x, weight, bias=None):
        """x [T,H], weight [R,H], bias [R] -> logits [T,R]."""
        self._begin()
        p = self._router_params(x, weight, bias)
        logits = self._out((len(x), len(weight)), torch.float32)
        p.logits = logits.address
        self._run("run_router", p)
        return torch.from_numpy(logits.array.copy())

    def router_backward(self, dlogits, x, weight, wants_dx=True, wants_dweight=True):
        """dlogits [T,R] -> dx [T,H], dweight [R,H]; None where it is not wanted."""
        self._begin()
        p = STRUCTS["RouterBackwardParams"](self._router_params(x, weight), self._in(dlogits))
        dx = self._out(x.shape, x.dtype) if wants_dx else None
        dweight = self._out(weight.shape, weight.dtype) if wants_dweight else None
        p.dx, p.dweight = (0 if b is None else b.address for b in (dx, dweight))
        workspace = self._workspace("router_backward_workspace", p)
        self._run("run_router_backward", p, workspace)
        return tuple(
            None if b is None else to_torch(b.array, t.dtype)
            for b, t in ((dx, x), (dweight, weight))
        )

    def permute(self, gates, capacity=None):
        """gates [T,E] -> pair_offsets [E+1], token_idx [A], token_offsets [T+1], slot_idx [A]."""
        self._begin()
        tokens, experts = gates.shape
        room = tokens * experts if capacity is None else capacity
        sizes = (experts + 1, room, tokens + 1, room)
        out = [self._out(max(n, 1), torch.int32) for n in sizes]
        p = STRUCTS["PermuteParams"](
            DTYPE["kFloat32"], tokens, experts, self._in(gates), room, *(b.address for b in out)
        )
        self._run("run_permute", p, self._workspace("permute_workspace", p))
        active = min(int(out[0].array[-1]), room)
        keep = (experts + 1, active, tokens + 1, active)
        return tuple(torch.from_numpy(b.array[:n].copy()) for b, n in zip(out, keep, strict=True))

    def _route_params(
        self, logits, threshold, expert_offsets, method, top_k, gates, rescale, gate_scale
    ):
        experts = len(expert_offsets) - 1
        p = STRUCTS["RouteParams"](
            DTYPE["kFloat32"],
            list(METHOD.values())[("threshold", "top_p", "top_k", "relu").index(method)],
        )
        p.num_tokens, p.num_experts = len(logits), experts
        p.num_shared, p.top_k = experts - logits.shape[1], top_k
        p.binary, p.rescale, p.gate_scale = gates == "binary", rescale, gate_scale
        p.threshold = self._in(torch.tensor([threshold], dtype=torch.float32))
        p.expert_offsets = self._in(expert_offsets)
        return p

    def route(
        self,
        logits,
        threshold,
        expert_offsets,
        *,
        method="threshold",
        top_k=0,
        gates="scores",
        rescale=True,
        gate_scale=1.0,
    ):
        """logits [T,R] -> gates [T,E], scores [T,R]."""
        self._begin()
        p = self._route_params(
            logits, threshold, expert_offsets, method, top_k, gates, rescale, gate_scale
        )
        p.logits = self._in(logits)
        out = [self._out((len(logits), n), torch.float32) for n in (p.num_experts, logits.shape[1])]
        p.gates, p.scores = (b.address for b in out)
        self._run("run_route", p)
        return tuple(torch.from_numpy(b.array.copy()) for b in out)

    def route_backward(
        self,
        dgates,
        dscores,
        gates_out,
        scores,
        expert_offsets,
        *,
        method="threshold",
        top_k=0,
        gates="scores",
        rescale=True,
        gate_scale=1.0,
    ):
        """Gradients of gates [T,E] and (or None) of scores [T,R] -> dlogits [T,R]."""
        self._begin()
        forward = self._route_params(
            scores, 0.0, expert_offsets, method, top_k, gates, rescale, gate_scale
        )
        forward.gates, forward.scores = self._in(gates_out), self._in(scores)
        out = self._out(scores.shape, torch.float32)
        p = STRUCTS["RouteBackwardParams"](
            forward, self._in(dgates), 0 if dscores is None else self._in(dscores), out.address
        )
        self._run("run_route_backward", p)
        return torch.from_numpy(out.array.copy())

    def _rows(self, x):
        """(address of a matrix whose rows may lie apart, elements between rows)."""
        stride = x.stride(0) if len(x) > 1 and x.shape[1] else x.shape[1]
        reach = (len(x) - 1) * stride + x.shape[1] if len(x) else 0
        return self._in(x.as_strided((reach,), (1,))), stride

    allow_tf32 = False

    def _mlp_params(self, x, gates, gate_proj, up_proj, down_proj_t, expert_offsets):
        p = STRUCTS["ExpertMlpParams"](DTYPE[KIND[x.dtype]])
        p.num_tokens, p.hidden_size = x.shape
        p.intermediate_size, p.num_experts = len(gate_proj), gates.shape[1]
        (p.x, p.x_stride), p.gates = self._rows(x), self._in(gates)
        p.gate_proj, p.up_proj = self._in(gate_proj), self._in(up_proj)
        p.expert_offsets = self._in(expert_offsets)
        p.gate_up = p.down = STRUCTS["WeightStrides"](0, x.shape[1], 1)
        if down_proj_t.is_contiguous():
            p.down_proj_t = self._in(down_proj_t)
        else:  # a view of [H,I]
            p.down_proj_t = self._in(down_proj_t.t())
            p.down = STRUCTS["WeightStrides"](0, 1, len(down_proj_t))
        p.allow_tf32, p.activation = self.allow_tf32, ACTIVATION[self.activation]
        return p

    def sparse_ffn(self, *inputs, save_activations=False):
        """x [T,H], gates [T,E], three weights [I,H], expert_offsets [E+1] -> y [T,H]."""
        self._begin()
        p = self._mlp_params(*inputs)
        y = self._out(inputs[0].shape, inputs[0].dtype)
        p.y = y.address
        self.saved = None
        if save_activations:
            kept = self._out(2 * len(inputs[0]) * len(inputs[2]), inputs[0].dtype)
            p.activations = kept.address
        self._run("run_expert_mlp", p, self._workspace("expert_mlp_workspace", p))
        if save_activations:
            kept.array.view(np.uint16)[~kept.initialised] = 0x7FFF  # NaN: the backward may not look
            self.saved = to_torch(kept.array, inputs[0].dtype)
        return to_torch(y.array, inputs[0].dtype)

    def sparse_ffn_backward(
        self, *inputs, dy, grad_weight=None, without=(), save_activations=False
    ):
        """Gradients by name, dx, dgates, dgate_proj, dup_proj, ddown_proj_t, but for `without`."""
        if save_activations:
            self.sparse_ffn(*inputs, save_activations=True)
        self._begin()
        p = STRUCTS["ExpertMlpBackwardParams"](self._mlp_params(*inputs))
        if save_activations:
            p.forward.activations = self._in(self.saved)
        p.dy, p.dy_stride = self._rows(dy)
        p.dgate_up, p.ddown = p.forward.gate_up, p.forward.down
        p.grad_weight = 0 if grad_weight is None else self._in(grad_weight)
        names = ("dx", "dgates", "dgate_proj", "dup_proj", "ddown_proj_t")
        like = {n: t for n, t in zip(names, inputs, strict=False) if n not in without}
        out = {n: self._out(t.shape, t.dtype) for n, t in like.items()}
        for name, buffer in out.items():
            setattr(p, name, buffer.address)
        workspace = self._workspace("expert_mlp_backward_workspace", p)
        self._run("run_expert_mlp_backward", p, workspace)
        return {n: to_torch(b.array, like[n].dtype) for n, b in out.items()}

    def router_workspace(self, tokens, routed, hidden):
        """Bytes that router_backward asks for where all is wanted."""
        self._begin()
        p = STRUCTS["RouterBackwardParams"]()
        p.forward = STRUCTS["RouterParams"](DTYPE["kBFloat16"], tokens, hidden, routed)
        p.dx = p.dweight = 1  # any address
        return self._workspace_bytes("router_backward_workspace", p)

    def forward_workspace(self, tokens, hidden, intermediate, experts, dtype):
        """Bytes that expert_mlp asks for."""
        self._begin()
        p = STRUCTS["ExpertMlpParams"](DTYPE[KIND[dtype]], tokens, hidden, intermediate, experts)
        return self._workspace_bytes("expert_mlp_workspace", p)

    def backward_workspace(self, tokens, hidden, intermediate, experts, dtype, with_grad_weight):
        """Bytes that expert_mlp_backward asks for."""
        self._begin()
        p = STRUCTS["ExpertMlpBackwardParams"]()
        p.forward = STRUCTS["ExpertMlpParams"](
            DTYPE[KIND[dtype]], tokens, hidden, intermediate, experts
        )
        p.grad_weight = int(with_grad_weight)  # any address
        return self._workspace_bytes("expert_mlp_backward_workspace", p)

    def backward_launches(self, tokens, hidden, intermediate, experts, dtype):
        """Names of the kernels that expert_mlp_backward launches for all gradients; none runs."""
        self._begin()
        self.device.launch = lambda *_, **__: None
        p = STRUCTS["ExpertMlpBackwardParams"]()
        p.forward = STRUCTS["ExpertMlpParams"](
            DTYPE[KIND[dtype]], tokens, hidden, intermediate, experts, hidden
        )
        p.dy_stride = hidden
        p.dgate_up = p.ddown = STRUCTS["WeightStrides"](0, hidden, 1)
        p.forward.gate_up = p.forward.down = p.dgate_up
        for params, names in (
            (p.forward, ("x", "gates", "gate_proj", "up_proj", "down_proj_t", "expert_offsets")),
            (p, ("dy", "dx", "dgates", "dgate_proj", "dup_proj", "ddown_proj_t")),
        ):
            for name in names:
                setattr(params, name, 1 << 20)  # any address
        self._run("run_expert_mlp_backward", p, 1 << 20)
        return [name for name, *_ in self.launches]

    def _workspace_bytes(self, entry, params):
        function = getattr(self.library, entry)
        function.restype = ctypes.c_int64
        return function(ctypes.byref(params))
