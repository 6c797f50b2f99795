"""A module on the CUDA kernels, by the Python that a GPU would run: on one where there is one, else
through the bindings' CUDA branch, the launchers and the interpreter.

The same module runs three times: in float64 and in its own dtype on the CPU, and on CUDA, which may
be at most twice as far from float64 as the CPU, plus a rounding. What was active must be the same.
"""

import contextlib
import copy

import torch
from on_cuda_kernels import cuda_kernels
from ops_under_test import ON_GPU


@contextlib.contextmanager
def cuda(arch="80"):
    """The device on which ops are CUDA's inside."""
    if ON_GPU:
        yield "cuda"
    else:
        with cuda_kernels(arch):
            yield "cpu"


def check(run, module, arch="80"):
    """run(module, device) -> {name: result}; results that are whole numbers must be equal."""
    exact = run(copy.deepcopy(module).double(), "cpu")
    cpu = run(copy.deepcopy(module), "cpu")
    with cuda(arch) as device:
        ours = run(copy.deepcopy(module).to(device), device)
    for name, result in ours.items():
        result, want = result.cpu(), exact[name]
        if not want.is_floating_point():
            assert torch.equal(result, want), name
            continue
        error, size = (result.double() - want).abs().max(), want.abs().max()
        allowed = 2 * (cpu[name].double() - want).abs().max() + torch.finfo(result.dtype).eps * size
        assert error <= allowed, f"{name}: {error:.3g} for values up to {size:.3g}"


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
