"""A hidden state of every token of the text: the one thing in calibration that grows with it.

Small ones stay in memory. Larger ones lie in a file without a name, which goes with the process,
and are read and written chunk after chunk: memory is then the same for any text.
"""

import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor

# Bytes of one state that stay in memory: 466,000 tokens of hidden size 576, 65,536 of 4096.
IN_MEMORY = 2**30


class States:
    """[N,L,H], uninitialised: `read(windows)` and `write(windows, value)` of slices of the windows.

    What is read is not to be changed in place. Raises OSError where a file is needed and the folder
    for temporary files (TMPDIR) has no room.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device
        self._memory: Tensor | None = None
        self._file: Any = None
        self._row = dtype.itemsize * self.shape[1:].numel()
        if shape[0] * self._row <= IN_MEMORY:
            self._memory = torch.empty(shape, dtype=dtype, device=device)
            return
        size, folder = shape[0] * self._row, tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if free < size:
            raise OSError(
                f"a hidden state of every token takes {size / 1e9:.1f} GB, and {folder} has "
                f"{free / 1e9:.1f} GB free: set TMPDIR to a folder with more, or calibrate on less "
                "text"
            )
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed with this object)

    def read(self, windows: slice) -> Tensor:
        """The windows' states [n,L,H]."""
        if self._memory is not None:
            return self._memory[windows]
        start, stop, _ = windows.indices(self.shape[0])
        value = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        self._file.seek(start * self._row)
        left = memoryview(value.view(torch.uint8).numpy().data).cast("B")
        while left:  # the system may give less than is asked for
            left = left[self._file.readinto(left) :]
        return value.to(self.device)

    def write(self, windows: slice, value: Tensor) -> None:
        """Puts in the windows' states, value [n,L,H]."""
        if self._memory is not None:
            self._memory[windows] = value
            return
        self._file.seek(windows.start * self._row)
        value = value.detach().to("cpu", self.dtype).contiguous()
        left = memoryview(value.view(torch.uint8).numpy().data).cast("B")
        while left:
            left = left[self._file.write(left) :]
