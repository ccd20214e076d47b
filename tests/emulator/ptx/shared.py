"""Shared memory of the CTAs of one batch, with the hazards that a lockstep emulation would hide.

All warps run in lockstep here, so a missing barrier changes no value. The checks find it: they keep, for every unit of
a few bytes, who wrote and who read it since the last barrier of its CTA. A `bar.warp.sync` orders the lanes of a warp
only: what is kept holds the number of those that the warp had passed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import KernelError
from .memory import Region
from .operands import Instruction
from .scalars import UINT, Array

SHARED_BASE = 0x400  # on sm_80 the first KiB belongs to the system
# Who accessed a unit: (barriers of the warp << 32) + SEVERAL_LANES, if it was several lanes, + the thread; or one of
NOBODY, SEVERAL_WARPS = -1, -2
SEVERAL_LANES, THREAD = 1 << 31, (1 << 31) - 1


@dataclass
class Copy:
    """A cp.async in flight, of several threads: its bytes land when its thread waits for its group."""

    threads: Array
    offsets: Array
    rows: Array  # uint32
    groups: Array

    def part(self, selected: Array) -> Copy:
        return Copy(self.threads[selected], self.offsets[selected], self.rows[selected], self.groups[selected])


class SharedMemory:
    def __init__(self, size: int, unit: int, check: bool, ctas: int, threads_per_cta: int) -> None:
        """`size` bytes for each CTA; `unit`: the smallest access in bytes, in which the checks count."""
        self.size, self.unit, self.check = size, unit, check
        self.stride = -(-max(size, 16) // 16) * 16
        self.cta = np.repeat(np.arange(ctas), threads_per_cta)  # of each thread
        self.region = Region("shared memory", SHARED_BASE, np.zeros(ctas * self.stride, np.uint8))
        self.units = self.region.data.view(UINT[unit])
        n = len(self.units) if check else 1

        self.written = np.zeros(n, np.bool_)
        self.writer, self.reader = np.full(n, NOBODY, np.int64), np.full(n, NOBODY, np.int64)
        self.in_flight = np.full(n, NOBODY, np.int64)  # the thread whose cp.async is on its way to the unit
        self.in_flight_value = np.zeros(n, UINT[unit])
        self.warp_barriers = np.zeros(ctas * threads_per_cta // 32, np.int64)  # how many the warp has passed
        self.span = {s: np.arange(s // unit) for s in (1, 2, 4, 8, 16) if s >= unit}
        self.copies: list[Copy] = []

    def reset(self, poison: int) -> None:
        self.region.data[:] = 0xFF if not poison else (poison * 37 + 11) & 0xFF  # 0xFF: NaN
        self.written[:] = False
        for who in (self.writer, self.reader, self.in_flight):
            who[:] = NOBODY
        self.warp_barriers[:] = 0
        self.copies = []

    def pass_barrier(self, ctas: Array) -> None:
        """All threads of these CTAs, given by a mask, have passed a barrier."""
        if self.check:
            for who in (self.writer, self.reader):
                who.reshape(len(ctas), -1)[ctas] = NOBODY

    def offsets(self, address: Array, size: int, ins: Instruction, threads: Array) -> Array:
        """Where accesses lie in the bytes of all CTAs."""
        offset = address.astype(np.int64) - SHARED_BASE
        odd = (offset & (size - 1)) != 0
        wrong = (offset < 0) | (offset > self.size - size) | odd
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            why = "misaligned" if odd[i] else f"out of bounds, of {self.size} bytes"
            raise KernelError(
                f"shared access of {size} bytes {why}, at offset {int(offset[i])} by {int(wrong.sum())} threads, the "
                f"first is {threads[i]}; {ins.where()}"
            )
        return offset + self.cta[threads] * self.stride

    def _units(self, offset: Array, size: int) -> Array:
        return (offset // self.unit)[:, None] + self.span[size]

    def _fault(
        self, what: str, units: Array, wrong: Array, threads: Array, ins: Instruction, who: Array | None = None
    ) -> None:
        """`who`: the accesses or threads that came before."""
        i, j = np.argwhere(wrong)[0]
        other = ""
        if who is not None:
            one = int(who[i, j])
            other = ", before it several warps" if one == SEVERAL_WARPS else f", before it thread {one & THREAD}"
            other += " and other lanes of its warp" if one >= 0 and one & SEVERAL_LANES else ""
        offset = int(units[i, j]) * self.unit % self.stride
        raise KernelError(
            f"{what}: shared offset {offset}, thread {threads[i]} of warp {threads[i] // 32}{other}; {ins.where()}"
        )

    def _code(self, threads: Array) -> Array:
        return (self.warp_barriers[threads >> 5] << 32) + threads

    def _foreign(self, who: Array, threads: Array) -> Array:
        """Whether nothing orders the earlier accesses `who` before one by `threads` now."""
        thread = (who & THREAD) != threads[:, None]
        warp = ((who & THREAD) >> 5) != (threads >> 5)[:, None]
        same_interval = (who >> 32) == self.warp_barriers[threads >> 5][:, None]
        several = (who & SEVERAL_LANES) != 0
        return (who == SEVERAL_WARPS) | ((who >= 0) & (warp | (same_interval & (thread | several))))

    def _note_read(self, offset: Array, size: int, threads: Array, ins: Instruction, collective: bool) -> None:
        units = self._units(offset, size)
        if self.copies:
            copying = self.in_flight[units]
            if (copying >= 0).any():
                self._fault("read of bytes that a cp.async has in flight", units, copying >= 0, threads, ins, copying)
        written = self.written[units]
        if not written.all():
            self._fault("read of uninitialised memory", units, ~written, threads, ins)
        writer = self.writer[units]
        if (writer != NOBODY).any():
            foreign = self._foreign(writer, threads)
            if foreign.any():
                self._fault("race: read after a write with no barrier between", units, foreign, threads, ins, writer)
        before, code = self.reader[units], self._code(threads)[:, None]
        alone = code + SEVERAL_LANES - (threads & 31)[:, None] if collective else code
        now = np.broadcast_to(alone, before.shape)
        if (before != NOBODY).any():
            now = self._joined(before, now, threads)
        self.reader[units] = now
        mixed = self.reader[units] != now  # several readers in this one instruction
        if mixed.any():
            lanes = self._joined(now, now, threads, always=True)
            self.reader[units[mixed]] = lanes[mixed]
            several = mixed & (self.reader[units] != lanes)
            self.reader[units[several]] = SEVERAL_WARPS

    def _joined(self, before: Array, now: Array, threads: Array, always: bool = False) -> Array:
        """Earlier readers and the present ones as one entry. Readers before a `bar.warp.sync` count no more."""
        several_lanes = (self._code(threads) + SEVERAL_LANES - (threads & 31))[:, None]
        if always:
            return np.where(before == SEVERAL_WARPS, SEVERAL_WARPS, several_lanes)
        other_warp = (before == SEVERAL_WARPS) | ((before >= 0) & (((before & THREAD) >> 5) != (threads >> 5)[:, None]))
        same_interval = (before >= 0) & ((before >> 32) == self.warp_barriers[threads >> 5][:, None])
        joined = np.where(same_interval & (before != now), several_lanes, now)
        return np.where(other_warp, SEVERAL_WARPS, joined)

    def _note_write(self, offset: Array, size: int, rows: Array, threads: Array, ins: Instruction, copy: bool) -> Array:
        """`rows`: the new bytes, as units. Writing what stands there already is no race."""
        units = self._units(offset, size)
        if self.copies:
            copying = self.in_flight[units]
            wrong = (copying >= 0) & ((self.in_flight_value[units] != rows) | (not copy))
            if wrong.any():
                self._fault("write to bytes that a cp.async has in flight", units, wrong, threads, ins, copying)
        differs = self.units[units] != rows
        if not differs.any():
            return units
        for who, what in ((self.writer[units], "write"), (self.reader[units], "read")):
            if (who != NOBODY).any():
                foreign = differs & self._foreign(who, threads)
                if foreign.any():
                    what = f"race: write after a {what} with no barrier between"
                    self._fault(what, units, foreign, threads, ins, who)
        return units

    def mark_written(self, units: Array, threads: Array) -> None:
        self.written[units] = True
        self.writer[units] = self._code(threads)[:, None]

    def load(
        self, address: Array, element: int, count: int, ins: Instruction, threads: Array, collective: bool = False
    ) -> Array:
        """`collective`: ldmatrix, where lanes get each other's rows."""
        size = element * count
        offset = self.offsets(address, size, ins, threads)
        if self.check:
            self._note_read(offset, size, threads, ins, collective)
        return self.region.rows(element, count)[offset // size]

    def store(self, address: Array, element: int, count: int, values: Array, ins: Instruction, threads: Array) -> None:
        size = element * count
        offset = self.offsets(address, size, ins, threads)
        if not self.check:
            self.region.rows(element, count)[offset // size] = values
            return
        rows = np.ascontiguousarray(values).view(UINT[self.unit]).reshape(len(offset), -1)
        units = self._note_write(offset, size, rows, threads, ins, copy=False)
        self.region.rows(element, count)[offset // size] = values
        self._check_kept(units, self.units, rows, threads, ins)
        self.mark_written(units, threads)

    def _check_kept(self, units: Array, values: Array, rows: Array, threads: Array, ins: Instruction) -> None:
        lost = values[units] != rows
        if lost.any():
            self._fault("race: threads write different values to one place at once", units, lost, threads, ins)

    def copy_async(self, address: Array, size: int, copy: Copy, ins: Instruction) -> None:
        copy.offsets = self.offsets(address, size, ins, copy.threads)
        if self.check:
            rows = copy.rows.view(UINT[self.unit]).reshape(len(copy.offsets), -1)
            units = self._note_write(copy.offsets, size, rows, copy.threads, ins, copy=True)
            self.in_flight[units] = copy.threads[:, None]
            self.in_flight_value[units] = rows
            self._check_kept(units, self.in_flight_value, rows, copy.threads, ins)
        self.copies.append(copy)

    def land(self, limit: Array) -> None:
        """Complete the copies of each thread whose group is below the thread's limit."""
        left = []
        for copy in self.copies:
            done = copy.groups < limit[copy.threads]
            if not done.all():
                left.append(copy.part(~done))
                if not done.any():
                    continue
                copy = copy.part(done)
            words = copy.rows.shape[1]
            self.region.rows(4, words)[copy.offsets // (4 * words)] = copy.rows
            if self.check:
                units = self._units(copy.offsets, 4 * words)
                self.in_flight[units] = NOBODY
                self.mark_written(units, copy.threads)
        self.copies = left
