"""A GPU in numpy: runs the PTX that nvcc emits from the unchanged kernels, and judges them.

    device = Device()
    x = device.array(values)       read-only to kernels; device.empty(shape, dtype) to be written
    device.launch(Program(text), "entry", grid=(4, 1, 1), block=(128, 1, 1), args=[x, 7])

It traps (raises Trap with the source line): unknown instructions; accesses out of bounds,
misaligned, of memory never written, or of a read-only buffer; data races in shared and global
memory, asynchronous copies and wgmma included; collectives reached by part of a warp; barriers that
never complete. It does not see ptxas, nor the order in which a tensor core sums, nor time.

    parse.py     PTX text -> instructions      machine.py   registers, program counters, schedule
    numbers.py   formats and rounding          memory.py    buffers, shared memory, bounds
    alu.py       arithmetic and logic          races.py     vector clocks
    convert.py   cvt, mov                      warp.py      shfl, vote, barriers
    transfer.py  ld, st, atom, cp.async        tensor.py    ldmatrix, mma
    counters.py  sectors, bank conflicts       device.py    what tests hold in their hands
    mbarrier.py  mbarriers                     bulk.py      cp.async.bulk (TMA)
    wgmma.py     warpgroups' products
"""

from .counters import Counters
from .device import Device
from .machine import Trap
from .parse import Program

__all__ = ["Counters", "Device", "Program", "Trap"]
