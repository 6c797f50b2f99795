"""Global buffers and shared memory: bounds, alignment, initialisation, races; and the device's
address map.

A global pointer is buffer number << 40 plus an offset, so that a wild pointer hits nothing and
offsets beyond 2^32 stay in their buffer. Shared memory appears in generic addresses at 1 << 60; a
kernel's parameters at their offsets.
"""

import numpy as np

from .races import Shadow

BUFFER_SHIFT = np.uint64(40)
OFFSET_MASK = np.uint64((1 << 40) - 1)
SHARED_WINDOW = np.uint64(1 << 60)


class BadAccess(Exception):
    pass


class Buffer:
    """A device allocation. Its bytes are a numpy array that the host reads back with .array."""

    def __init__(self, address, array, initialised, writable):
        self.address, self.array, self.writable = address, array, writable
        self.bytes = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
        # per granule of 2 bytes; what kernels cannot write needs none, however large it is
        self.initialised = np.full((self.bytes.size + 1) // 2 if writable else 0, initialised)
        self.shadow = None


class GlobalMemory:
    def __init__(self):
        self.buffers = {}

    def add(self, array, initialised=True, writable=False):
        number = len(self.buffers) + 1
        self.buffers[number] = Buffer(number << 40, array, initialised, writable)
        return self.buffers[number]

    def begin(self, clocks):
        """A launch starts: everything before it is ordered before everything in it."""
        for buffer in self.buffers.values():
            buffer.shadow = None
        self.clocks = clocks

    def _locate(self, address):
        """(numbers of the buffers, offsets in them)."""
        return address >> BUFFER_SHIFT, (address & OFFSET_MASK).astype(np.int64)

    def _split(self, address, size):
        number, offset = self._locate(address)
        first = int(number[0])
        groups = (
            [(first, slice(None))]
            if (number == first).all()
            else [(int(i), number == i) for i in np.unique(number)]
        )
        for i, part in groups:
            buffer, off = self.buffers.get(i), offset[part]
            if buffer is None:
                raise BadAccess(f"wild global address {int(address[part][0]):#x}")
            if (off + size > buffer.bytes.size).any():
                worst = int(off.max())
                raise BadAccess(
                    f"global access at byte {worst} of buffer {i}, which has {buffer.bytes.size}"
                )
            if (odd := address[part] % np.uint64(size) != 0).any():
                worst = int(off[odd][0])
                raise BadAccess(f"misaligned global access of {size} bytes at byte {worst}")
            yield buffer, off, part

    def _granules(self, off, size, thread):
        count = max(size // 2, 1)
        at = (off // 2)[:, None] + np.arange(count)
        return at.reshape(-1), np.repeat(thread, count)

    def _shadow(self, buffer):
        if buffer.shadow is None:
            buffer.shadow = Shadow(len(buffer.initialised), self.clocks, buffer.initialised)
        return buffer.shadow

    def load(self, address, size, thread, atomic=False):
        """address, thread: [k]; returns uint8 [k, size]."""
        out = np.empty((len(address), size), np.uint8)
        for buffer, off, part in self._split(address, size):
            if buffer.writable:
                at, who = self._granules(off, size, thread[part])
                self._shadow(buffer).on_read(at, who, atomic)
                if not (known := buffer.initialised[at]).all():
                    first = 2 * int(at[~known][0])
                    raise BadAccess(f"global memory read before it was written (byte {first})")
            out[part] = buffer.bytes[off[:, None] + np.arange(size)]
        return out

    def store(self, address, data, thread, atomic=False):
        size = data.shape[1]
        for buffer, off, part in self._split(address, size):
            if not buffer.writable:
                raise BadAccess("store to a read-only buffer")
            at, who = self._granules(off, size, thread[part])
            self._shadow(buffer).on_write(at, who, atomic)
            buffer.initialised[at] = True
            buffer.bytes[off[:, None] + np.arange(size)] = data[part]

    def fill(self, address, value, count):
        """What cudaMemset does."""
        ((buffer, (start,), _),) = self._split(np.array([address], np.uint64), 1)
        if start + count > buffer.bytes.size:
            raise BadAccess(f"a memset reaches byte {start + count} of {buffer.bytes.size}")
        buffer.bytes[start : start + count] = value
        buffer.initialised[start // 2 : (start + count) // 2] = True


class SharedMemory:
    """One array for all CTAs; addresses are within the own CTA's part."""

    def __init__(self, ctas, size, clocks):
        self.size = -(-max(size, 1) // 16) * 16
        self.bytes = np.full(ctas * self.size, 0xFF, np.uint8)
        self.initialised = np.zeros(ctas * self.size // 2, bool)
        self.shadow = Shadow(len(self.initialised), clocks, self.initialised)
        self.limit, self.per = size, clocks.per

    def place(self, address, size, thread):
        """Checked byte positions [k] in the array of all CTAs."""
        at = address.astype(np.int64)
        if (at + size > self.limit).any() or (at < 0).any():
            raise BadAccess(f"shared access at byte {int(at.max())} of {self.limit}")
        if (at % size).any():
            raise BadAccess(
                f"misaligned shared access of {size} bytes at byte {int(at[at % size != 0][0])}"
            )
        return at + thread // self.per * self.size

    def granules(self, place, size, thread):
        count = max(size // 2, 1)
        return ((place // 2)[:, None] + np.arange(count)).reshape(-1), np.repeat(thread, count)

    def load(self, address, size, thread, atomic=False):
        place = self.place(address, size, thread)
        at, who = self.granules(place, size, thread)
        self.shadow.on_read(at, who, atomic)
        if not (known := self.initialised[at]).all():
            first = int(at[~known][0]) * 2 % self.size
            raise BadAccess(f"shared memory read before it was written (byte {first})")
        return self.bytes[place[:, None] + np.arange(size)]

    def store(self, address, data, thread, atomic=False):
        place = self.place(address, data.shape[1], thread)
        at, who = self.granules(place, data.shape[1], thread)
        self.shadow.on_write(at, who, atomic)
        self.initialised[at] = True
        self.bytes[place[:, None] + np.arange(data.shape[1])] = data

    def begin_copy(self, address, size, thread):
        """An asynchronous write starts; until end_copy nobody may touch its target."""
        place = self.place(address, size, thread)
        at, who = self.granules(place, size, thread)
        self.shadow.on_write(at, who, pending=True)
        return place

    def end_copy(self, place, data, thread):
        at, who = self.granules(place, data.shape[1], thread)
        self.shadow.complete(at, who)
        self.initialised[at] = True
        self.bytes[place[:, None] + np.arange(data.shape[1])] = data

    # -- the asynchronous proxy --

    def begin_bulk(self, address, size, thread, agent):
        """A bulk copy to `size` bytes starts; land_bulk ends it."""
        place = self.place(np.array([address]), 16, np.array([thread]))
        if address + size > self.limit:
            raise BadAccess(f"a bulk copy reaches byte {address + size} of {self.limit}")
        at = np.arange(place[0] // 2, (place[0] + size) // 2)
        self.shadow.on_bulk_write(at, thread, agent)
        return at

    def land_bulk(self, at, data, phase):
        self.shadow.landed(at, phase)
        self.initialised[at] = True
        self.bytes[2 * at[0] : 2 * at[0] + data.size] = data

    def load_multiplied(self, address, threads, warps, group):
        """What wgmma by these threads reads: 16 bytes at each of the addresses, any shape."""
        flat = address.reshape(-1)
        place = self.place(flat, 16, np.broadcast_to(threads[0], flat.shape))
        at = (place // 2)[:, None] + np.arange(8)
        self.shadow.on_multiply(at.reshape(-1), threads)
        if not (known := self.initialised[at]).all():
            first = int(at[~known][0]) * 2 % self.size
            raise BadAccess(f"shared memory read before it was written (byte {first})")
        self.shadow.multiplied_by(at[:, 0], warps, group)
        data = self.bytes[place[:, None] + np.arange(16)]
        return data.view(np.uint16).reshape(*address.shape, 8)
