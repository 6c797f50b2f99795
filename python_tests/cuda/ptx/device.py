"""What a test holds in its hands: buffers and launches."""

import numpy as np

# their opcodes register themselves
from . import alu, convert, mbarrier, tensor, transfer, warp, wgmma  # noqa: F401
from .machine import Machine, Trap
from .memory import Buffer, GlobalMemory
from .numbers import TYPES


class Device:
    def __init__(self, seed=None, counters=None):
        self.memory = GlobalMemory()
        self.seed, self.counters = seed, counters

    def array(self, values):
        """A buffer that kernels may only read. Nothing is copied: a sparse array of many gigabytes,
        of which only a few pages exist, is as good as any other."""
        return self.memory.add(np.ascontiguousarray(values))

    def empty(self, shape, dtype):
        """A buffer to be written; reading what was not written is a Trap."""
        array = np.zeros(shape, dtype)
        array.reshape(-1).view(np.uint8)[:] = 0xFF
        return self.memory.add(array, initialised=False, writable=True)

    def copy(self, values):
        """A buffer that kernels may read and write."""
        return self.memory.add(np.array(values, order="C"), writable=True)

    def launch(self, program, entry, grid, block, shared_bytes=0, args=(), param_bytes=None):
        """args: one value per kernel parameter (Buffer or number), or the raw param_bytes."""
        kernel = program.find(entry)
        if param_bytes is None:
            param_bytes = bytearray(kernel.param_bytes)
            if len(args) != len(kernel.params):
                raise Trap(f"{len(args)} arguments for {len(kernel.params)} parameters")
            for (offset, size), value in zip(kernel.params.values(), args, strict=True):
                param_bytes[offset : offset + size] = encode(value, size)
        machine = Machine(
            kernel, grid, block, shared_bytes, param_bytes, self.memory, self.seed, self.counters
        )
        return machine.run()


def encode(value, size):
    """Little-endian bytes of one kernel argument."""
    if isinstance(value, Buffer):
        value = value.address
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return np.array(value, f"f{size}").tobytes()
    if isinstance(value, np.generic):
        return value.tobytes()
    return np.array(value & (1 << 8 * size) - 1, TYPES[f"u{8 * size}"]).tobytes()
