"""Memory of a launch: allocations with exact bounds, what has been written of them, and who touched it since when."""

import bisect
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Mask = Array | None  # of threads that take part, None for all


class Fault(Exception):  # noqa: N818
    """What a kernel must not do."""


class Region:
    """Bytes from `base` on, in memory of the process or of their own.

    Attributes:
        grain: bytes that are told apart in who touched them.
        written: of each grain.
    """

    def __init__(self, space: str, name: str, base: int, size: int, grain: int, data: Array | None, written: bool):
        self.space, self.name, self.base, self.end, self.grain = space, name, base, base + size, grain
        # Of whole 16 bytes, as vectors are aligned; what is beyond the bounds is not touched.
        self.origin = base // 16 * 16
        length = -(-(self.end - self.origin) // 16) * 16
        if data is None:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(self.origin))
        self.views = {size: data[:length].view(f"u{size}") for size in (1, 2, 4, 8)}
        grains = length // grain
        self.written = np.full(grains, written)
        # The last thread that wrote and that read, and of each the barriers of its warp and block at that time.
        self.writer, self.reader = np.full((3, grains), -1), np.full((3, grains), -1)
        # The barriers since which several threads of a warp, or several warps, have read it.
        self.several = np.full((2, grains), -1)


class Memory:
    """Allocations by address: one space for all, in which those of threads and blocks are far from real ones."""

    SHARED, LOCAL, PARAMETERS, CONSTANT = 1 << 12, 1 << 24, 1 << 28, 1 << 30

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.bases: list[int] = []

    def add(self, *arguments: Any) -> Region:
        region = Region(*arguments)
        at = bisect.bisect(self.bases, region.base)
        self.regions.insert(at, region)
        self.bases.insert(at, region.base)
        return region

    def remove(self, space: str) -> None:
        self.regions = [region for region in self.regions if region.space != space]
        self.bases = [region.base for region in self.regions]

    def find(self, address: Array, threads: Array, size: int, step: int, space: str) -> list[tuple[Region, Any]]:
        """The regions of these addresses, and which of the addresses lie there."""
        if (address % step).any():
            raise Fault(f"misaligned: {self.told(address, threads, address % step != 0)} is no multiple of {step}")
        low, high = int(address.min()), int(address.max())
        region = self.regions[max(0, bisect.bisect(self.bases, low) - 1)]
        if region.base <= low and high + size <= region.end:
            found = [(region, slice(None))]
        else:
            number = np.searchsorted(np.array(self.bases, np.uint64), address, "right").astype(np.int64) - 1
            ends = np.array([region.end for region in self.regions], np.uint64)
            outside = (number < 0) | (address + np.uint64(size) > ends[number])
            if outside.any():
                raise Fault(f"out of bounds: {size} bytes at {self.told(address, threads, outside)}")
            found = [(self.regions[i], np.flatnonzero(number == i)) for i in np.unique(number)]
        for region, _ in found:
            if space not in ("generic", region.space):
                raise Fault(f"not in {space} memory: {self.told(address, threads, address >= region.base)}")
        return found

    def told(self, address: Array, threads: Array, wrong: Array) -> str:
        first = int(np.flatnonzero(wrong)[0])
        at = int(address[first])
        near = min(self.regions, key=lambda region: max(region.base - at, at - region.end, 0))
        size = near.end - near.base
        return f"byte {at - near.base} of {near.name}, {size} bytes, by thread {threads[first]}"


class Watch:
    """Reports what is read unwritten, and what is touched by two threads with no barrier between.

    Threads have numbers of all blocks; barriers as well, so that those of any two blocks or warps differ.
    """

    def __init__(self, threads: int, padded: bool) -> None:
        self.threads, self.padded = threads, padded
        self.numbers = np.arange(threads)
        self.count = 0
        self.start()

    def start(self) -> None:
        """A new block."""
        self.block = self.count = self.count + 1
        self.warps = np.full(self.threads, self.block)
        self.first = self.count * self.threads
        self.barrier(None)

    def barrier(self, mask: Mask) -> None:
        """Of those threads' warps, or of the block."""
        self.count += 1
        if mask is None:
            self.block = self.count
            warp = self.numbers // 32
            self.warps = self.count + warp
            self.count += int(warp[-1])
        else:
            self.warps[mask] = self.count

    def _races(self, before: Array, thread: Array, stamp: Array) -> Array:
        other, warp, block = before
        apart = (other >= 0) & (other != thread)
        if not apart.any():
            return apart
        same_block = other // self.threads == thread // self.threads
        return apart & ((warp == stamp) | ~same_block | ((block == self.block) & (other // 32 != thread // 32)))

    def _told(self, what: str, region: Region, grain: Array, wrong: Array, other: Array, thread: Array) -> Fault:
        i = int(np.flatnonzero(wrong)[0])
        at = int(grain[i]) * region.grain - (region.base - region.origin)
        pair = f"threads {other[i] % self.threads} and {thread[i] % self.threads}"
        blocks = "of two blocks" if other[i] // self.threads != thread[i] // self.threads else "of a block"
        return Fault(f"race: {what} byte {at} of {region.name}, {pair} {blocks}, with no barrier between")

    def _grains(self, region: Region, address: Array, threads: Array, size: int) -> tuple[Array, Array, Array]:
        first = (address - np.uint64(region.origin)).astype(np.int64) // region.grain
        many = max(1, size // region.grain)
        grain = (first[:, None] + np.arange(many)).ravel() if many > 1 else first
        thread = np.repeat(threads, many) if many > 1 else threads
        return grain, thread + self.first, self.warps[thread]

    def read(self, region: Region, address: Array, threads: Array, size: int) -> None:
        if region.space not in ("global", "shared"):
            return
        grain, thread, stamp = self._grains(region, address, threads, size)
        unwritten = ~region.written[grain]
        if unwritten.any() and not (self.padded and region.space == "shared"):
            i = int(np.flatnonzero(unwritten)[0])
            at = int(grain[i]) * region.grain - (region.base - region.origin)
            raise Fault(f"unwritten: byte {at} of {region.name} is read by thread {thread[i] % self.threads}")
        wrong = self._races(region.writer[:, grain], thread, stamp)
        if wrong.any():
            raise self._told("a read after a write of", region, grain, wrong, region.writer[0, grain], thread)
        before = region.reader[:, grain]
        region.reader[:, grain] = thread, stamp, np.full(len(thread), self.block)
        for other in (before, region.reader[:, grain]):
            apart = (other[0] >= 0) & (other[0] != thread)
            same_warp = apart & (other[1] == stamp)
            if same_warp.any():
                region.several[0, grain[same_warp]] = stamp[same_warp]
            several = apart & (other[2] == self.block) & (other[0] // 32 != thread // 32)
            if several.any():
                region.several[1, grain[several]] = self.block

    def write(
        self, region: Region, address: Array, threads: Array, size: int, store: Callable[[], None], reads: bool
    ) -> None:
        """`store` writes; what leaves the bits as they were may be written by anyone. `reads` says whether a write
        after a read is one too many."""
        if region.space not in ("global", "shared"):
            store()
            return
        grain, thread, stamp = self._grains(region, address, threads, size)
        old = region.views[region.grain][grain]
        store()
        changed = (old != region.views[region.grain][grain]) | ~region.written[grain]
        before = region.writer[:, grain]
        wrong = changed & self._races(before, thread, stamp)
        if wrong.any():
            raise self._told("two writes of", region, grain, wrong, before[0], thread)
        before = region.reader[:, grain]
        changed &= reads
        wrong = changed & self._races(before, thread, stamp)
        wrong |= changed & (before[0] >= 0) & (region.several[0, grain] == stamp)
        wrong |= changed & (region.several[1, grain] == self.block)
        if wrong.any():
            raise self._told("a write after a read of", region, grain, wrong, before[0], thread)
        region.written[grain] = True
        region.writer[:, grain] = thread, stamp, np.full(len(thread), self.block)

    def clash(self, region: Region, address: Array, threads: Array) -> Fault:
        """Of threads that write different values in one instruction."""
        grain, thread, _ = self._grains(region, address, threads, 1)
        other = region.writer[0, grain]
        return self._told("two writes of", region, grain, np.full(len(grain), True), other, thread)
