"""Global and local memory: where an access may go, and who stored what."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .errors import KernelError
from .operands import LOCAL_BASE, Instruction
from .scalars import U8, U64, UINT, Array

# Every region has a window of its own, so far from the next one that no wrong offset reaches it. A window's region
# begins 4 KiB before a multiple of 4 GiB: address arithmetic in 32 bits goes wrong there.
FIRST_WINDOW = 0x7F0000000000
WINDOW = 1 << 36
REGION_START = (1 << 32) - 4096


class Region:
    """Bytes that a kernel may touch."""

    def __init__(self, name: str, base: int, data: Array) -> None:
        self.name, self.base, self.data = name, base, data
        self.owner: Array | None = None  # of each byte, 1 + the CTA that stored it in this launch; 0: none
        self._rows: dict[tuple[int, int], Array] = {}

    def rows(self, element: int, count: int) -> Array:
        """The bytes as (n, count) unsigned integers of `element` bytes."""
        if (element, count) not in self._rows:
            size = element * count
            whole = self.data[: len(self.data) // size * size]
            self._rows[element, count] = whole.view(UINT[element]).reshape(-1, count)
        return self._rows[element, count]


class GlobalMemory:
    def __init__(self) -> None:
        self.regions: dict[int, Region] = {}  # by window
        self._next = 0

    def add(self, name: str, data: Array) -> Region:
        """Make bytes part of the memory, at an address that was never used before."""
        if len(data) > WINDOW - REGION_START:
            raise MemoryError(f"{len(data)} bytes do not fit the emulator's {WINDOW - REGION_START}")
        window, self._next = self._next, self._next + 1
        self.regions[window] = Region(name, FIRST_WINDOW + window * WINDOW + REGION_START, data)
        return self.regions[window]

    def remove(self, region: Region) -> None:
        self.regions.pop((region.base - FIRST_WINDOW) // WINDOW, None)

    def find(self, address: int) -> Region | None:
        """The region that the address lies in, or just behind."""
        region = self.regions.get((address - FIRST_WINDOW) // WINDOW)
        return region if region is not None and 0 <= address - region.base <= len(region.data) else None

    def begin_launch(self) -> None:
        for region in self.regions.values():
            region.owner = None

    def _split(
        self, address: Array, size: int, ins: Instruction, threads: Array, what: str
    ) -> Iterator[tuple[Region, Array | slice, Array]]:
        """The accesses by region: which of them, and their offsets in bytes. Those that lie in none are a fault."""
        if not len(address):
            return
        odd = address & U64(size - 1)
        if odd.any():
            i = int(np.flatnonzero(odd)[0])
            raise KernelError(
                f"misaligned {size}-byte global {what} by thread {threads[i]} at {int(address[i]):#x}; {ins.where()}"
            )
        windows = (address - U64(FIRST_WINDOW)) // U64(WINDOW)
        whole = bool((windows == windows[0]).all())
        for window in windows[:1] if whole else np.unique(windows):
            selected: Array | slice = slice(None) if whole else np.flatnonzero(windows == window)
            region = self.regions.get(int(window))
            if region is None:
                self._outside(None, address[selected], size, ins, threads[selected], what)
                return
            offset = (address[selected] - U64(region.base)).astype(np.int64)
            outside = (offset < 0) | (offset > len(region.data) - size)
            if outside.any():
                self._outside(region, address[selected][outside], size, ins, threads[selected][outside], what)
            yield region, selected, offset

    def _outside(
        self, region: Region | None, address: Array, size: int, ins: Instruction, threads: Array, what: str
    ) -> None:
        near = "no memory is near it"
        if region is not None:
            near = f"offset {int(address[0]) - region.base} in {region.name} of {len(region.data)} bytes"
        raise KernelError(
            f"global {what} of {size} bytes out of bounds at {int(address[0]):#x} by {len(address)} threads, "
            f"the first is {threads[0]}: {near}; {ins.where()}"
        )

    def load(self, address: Array, element: int, count: int, ins: Instruction, threads: Array, ctas: Array) -> Array:
        """(n, count) unsigned integers. `ctas` is None where other CTAs' stores may be read (atomics)."""
        size = element * count
        out = np.zeros((0, count), UINT[element])
        for region, selected, offset in self._split(address, size, ins, threads, "load"):
            values = region.rows(element, count)[offset // size]
            if region.owner is not None:
                self._check_owner(region, offset, size, ins, ctas[selected], "reads", "stored in this launch")
            if isinstance(selected, slice):
                return values
            if not len(out):
                out = np.zeros((len(address), count), UINT[element])
            out[selected] = values
        return out

    def store(
        self, address: Array, element: int, count: int, values: Array, ins: Instruction, threads: Array, ctas: Array
    ) -> None:
        size = element * count
        for region, selected, offset in self._split(address, size, ins, threads, "store"):
            rows = region.rows(element, count)
            if region.owner is None:
                region.owner = np.zeros(len(region.data), np.int32)
            own = ctas[selected]
            self._check_owner(region, offset, size, ins, own, "stores to", "stored in this launch")
            span = offset[:, None] + np.arange(size)
            region.owner[span] = own[:, None] + 1
            self._check_owner(region, offset, size, ins, own, "stores to", "stores to in the same instruction")
            at = offset // size
            rows[at] = values[selected]
            if (rows[at] != values[selected]).any():
                raise KernelError(f"race: threads store different values to one place in {region.name}; {ins.where()}")

    @staticmethod
    def _check_owner(
        region: Region, offset: Array, size: int, ins: Instruction, ctas: Array, does: str, did: str
    ) -> None:
        assert region.owner is not None
        owner = region.owner[offset[:, None] + np.arange(size)]
        foreign = (owner != 0) & (owner != ctas[:, None] + 1)
        if foreign.any():
            i, j = np.argwhere(foreign)[0]
            raise KernelError(
                f"race: CTA {int(ctas[i])} {does} byte {int(offset[i]) + int(j)} of {region.name}, which CTA "
                f"{int(owner[i, j]) - 1} {did}; {ins.where()}"
            )

    def atomic_view(
        self, address: Array, element: int, ins: Instruction, threads: Array
    ) -> Iterator[tuple[Array, Array | slice, Array]]:
        """For atomics, which do not race: rows to change in place, which accesses they serve, and where."""
        for region, selected, offset in self._split(address, element, ins, threads, "atomic"):
            yield region.rows(element, 1), selected, offset // element


class LocalMemory:
    """Every thread's own memory; all threads use the same addresses."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self.data = np.zeros((threads, -(-max(size, 16) // 16) * 16), U8)

    def _index(self, address: Array, element: int, count: int, ins: Instruction, threads: Array) -> tuple[Array, Array]:
        offset = address.astype(np.int64) - LOCAL_BASE
        size = element * count
        wrong = (offset < 0) | (offset + size > self.size) | (offset % size != 0)
        if wrong.any():
            raise KernelError(
                f"local access out of bounds or misaligned at offset {int(offset[wrong][0])} by thread "
                f"{threads[wrong][0]}; {ins.where()}"
            )
        return threads[:, None], (offset // element)[:, None] + np.arange(count)

    def load(self, address: Array, element: int, count: int, ins: Instruction, threads: Array) -> Array:
        return self.data.view(UINT[element])[self._index(address, element, count, ins, threads)]

    def store(self, address: Array, element: int, count: int, values: Array, ins: Instruction, threads: Array) -> None:
        self.data.view(UINT[element])[self._index(address, element, count, ins, threads)] = values
