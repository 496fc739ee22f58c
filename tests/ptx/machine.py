"""Runs a launch: blocks one after another, the threads of each as one array, those behind others first."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import operations as do
from .memory import Array, Fault, Mask, Memory, Region, Watch
from .translate import Program

Where = tuple[int, str, str]  # line, instruction and source


@dataclass
class Counts:
    """Of a launch: instructions of warps, bytes that their threads read and wrote in global memory, each once a warp
    and instruction, and what banks cost."""

    instructions: int = 0
    read: int = 0
    written: int = 0
    conflicts: int = 0


class Rules(NamedTuple):
    """What is allowed besides.

    Attributes:
        copied: beginnings of sources of stores before which threads may read that have a copy of what another one
            stores, and do not use it.
        padded: unwritten shared memory may be read, and is nan: of whole vectors, a part of which is not used.
    """

    copied: tuple[str, ...] = ()
    padded: bool = False


NO_MORE = Rules()


class Machine:
    def __init__(self, program: Program, memory: Memory, parameters: bytes, shared: int, rules: Rules) -> None:
        self.rules = rules
        self.program, self.memory, self.counts = program, memory, Counts()
        self.all = np.full(program.threads, True)
        self.threads = np.arange(program.threads)
        self.watch = Watch(program.threads, rules.padded)
        self.shared_size = program.shared_size + shared
        if len(parameters) != program.parameter_size:
            raise ValueError(f"expected {program.parameter_size} bytes of parameters, got {len(parameters)}")
        data = np.frombuffer(parameters.ljust(-(-len(parameters) // 16) * 16, b"\0"), np.uint8)
        memory.add("param", "parameters", Memory.PARAMETERS, len(parameters), 1, data, True)
        for each in program.kernel.of("global", "const"):
            size = -(-each.size // 16) * 16 + 16
            data = np.frombuffer(bytearray(each.values.ljust(size, b"\0")), np.uint8)
            memory.add(each.space, each.name, program.symbols[each.name], each.size, 1, data, True)

    def block(self, index: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        memory, program = self.memory, self.program
        for space in ("shared", "local"):
            memory.remove(space)
        if self.shared_size:
            data = np.full(-(-self.shared_size // 16) * 16, 0xFF, np.uint8)  # nan
            memory.add("shared", "shared memory", Memory.SHARED, self.shared_size, program.grain, data, False)
        if program.local_size:
            size = program.local_size * program.threads
            memory.add("local", "local memory", Memory.LOCAL, size, 1, np.full(size, 0xFF, np.uint8), True)
        self.watch.start()
        self.special = {"%laneid": self.threads % 32, "%warpid": self.threads // 32, "%tid.x": self.threads}
        for name, numbers in (("ntid", (program.threads, 1, 1)), ("ctaid", index), ("nctaid", grid)):
            self.special |= {f"%{name}.{axis}": 0 * self.threads + x for axis, x in zip("xyz", numbers, strict=True)}
        with np.errstate(all="ignore"):
            self._run()

    def _run(self) -> None:
        program, blocks, labels = self.program, self.program.kernel.blocks, self.program.kernel.labels
        state: list[Array] = []
        end = len(blocks)
        at: int | None = 0  # the block of all threads, if it is one
        counters = np.zeros(program.threads, np.int64)
        warps = program.threads // 32
        while at != end:
            if at is None:
                number, mask = self._next(counters)
                if mask.all():
                    mask = None
            else:
                number, mask = at, None
            block = blocks[number]
            function = program.function(number, mask is not None)
            if len(state) < len(program.registers):
                state.extend(program.initial()[len(state) :])
            found = function(state, self, mask)
            active = warps if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
            self.counts.instructions += active * (len(block.instructions) + (block.end is not None))
            target: int | Array = number + 1
            if block.end is not None:
                target = labels[block.end.operands[0]] if block.end.code[0] == "bra" else end
                if found is not None:
                    some = found if mask is None else found[mask]
                    if not some.any():
                        target = number + 1
                    elif not some.all():
                        target = np.where(found, target, number + 1)
            if mask is None and not isinstance(target, np.ndarray):
                at = target
                continue
            if mask is None:
                counters = target
            else:
                if at is not None:
                    counters = np.full(program.threads, at)
                counters = np.where(mask, target, counters)
            at = int(counters[0]) if (counters == counters[0]).all() else None

    def _next(self, counters: Array) -> tuple[int, Array]:
        """The first block that some threads are at and need not wait for others, and which threads these are."""
        blocks = self.program.kernel.blocks
        waiting = []
        for number in np.unique(counters):
            if number == len(blocks):
                continue
            mask, sync = counters == number, blocks[number].sync
            if sync is None:
                return int(number), mask
            if sync.code == ("bar", "sync"):
                if mask.all():
                    return int(number), mask
                waiting.append((sync, mask))
                continue
            whole = mask.reshape(-1, 32).all(axis=1)
            if whole.any():
                return int(number), np.repeat(whole, 32)
            waiting.append((sync, mask))
        told = [f"{int(mask.sum())} threads at line {i.line}, {i.text} ({i.source})" for i, mask in waiting]
        ended = int((counters == len(blocks)).sum())
        raise Fault(f"divergent barrier: {'; '.join(told)}; {ended} of {self.program.threads} threads have ended")

    # ---- What the functions of blocks call ----

    def _lanes(self, address: Array, mask: Mask) -> tuple[Array, Array]:
        return (address, self.threads) if mask is None else (address[mask], self.threads[mask])

    def load(self, address: Array, mask: Mask, dtype: str, parts: int, space: str, where: Where) -> list[Array]:
        address, threads = self._lanes(address, mask)
        size = int(dtype[1])
        found = [np.zeros(self.program.threads, f"u{size}") for _ in range(parts)]
        if len(threads):
            try:
                for region, which in self.memory.find(address, threads, size * parts, size * parts, space):
                    at, to = address[which], threads[which]
                    self.watch.read(region, at, to, size * parts)
                    first = (at - np.uint64(region.origin)).astype(np.int64) // size
                    for i in range(parts):
                        found[i][to] = region.views[size][first + i]
                    self._count(region, at, to, size * parts, "read")
            except Fault as fault:
                raise self._placed(fault, where) from None
        return [x.view(dtype) for x in found]

    def store(
        self, values: list[Array], address: Array, mask: Mask, dtype: str, parts: int, space: str, where: Where
    ) -> None:
        address, threads = self._lanes(address, mask)
        if len(threads) == 0:
            return
        size = int(dtype[1])
        try:
            for region, which in self.memory.find(address, threads, size * parts, size * parts, space):
                if region.space in ("param", "const"):
                    raise Fault(f"a store to {region.name}")
                at, source = address[which], threads[which]
                first = (at - np.uint64(region.origin)).astype(np.int64) // size
                view = region.views[size]

                def put(first: Array = first, view: Array = view, source: Array = source) -> None:
                    for i, value in enumerate(values):
                        view[first + i] = value.view(view.dtype)[source]

                self.watch.write(region, at, source, size * parts, put, not where[2].startswith(self.rules.copied))
                for i, value in enumerate(values):
                    differs = view[first + i] != value.view(view.dtype)[source]
                    if differs.any():
                        raise self.watch.clash(region, at[differs], source[differs])
                self._count(region, at, source, size * parts, "written")
        except Fault as fault:
            raise self._placed(fault, where) from None

    def load_matrices(self, address: Array, count: int, where: Where) -> list[Array]:
        return [self.load(at, None, "u4", 1, "shared", where)[0] for at in self._rows(address, count)]

    def store_matrices(self, values: list[Array], address: Array, count: int, where: Where) -> None:
        for value, at in zip(values, self._rows(address, count), strict=True):
            self.store([value], at, None, "u4", 1, "shared", where)

    def _rows(self, address: Array, count: int) -> list[Array]:
        """Where the four bytes are that each thread has of each matrix."""
        lane = self.threads % 32
        return [address[self.threads - lane + 8 * i + lane // 4] + (4 * (lane % 4)).astype("u8") for i in range(count)]

    def shuffled(self, kind: str, by: Array, clamp: Array, mask: Mask) -> tuple[Array, Array]:
        source, inside = do.shuffle_lanes(kind, by, clamp)
        if mask is not None and not mask[source[mask]].all():
            raise Fault("a shuffle reads from a thread that does not take part")
        return source, inside

    def _count(self, region: Region, address: Array, threads: Array, size: int, what: str) -> None:
        if region.space == "global":
            different = np.unique((threads // 32).astype("u8") << np.uint64(48) | address).size
            setattr(self.counts, what, getattr(self.counts, what) + size * different)
        elif region.space == "shared":
            self.counts.conflicts += do.bank_passes(address, threads, size)

    def _placed(self, fault: Fault, where: Where) -> Fault:
        line, text, source = where
        return Fault(f"{fault} [{self.program.kernel.name}, line {line}, {text}{', ' if source else ''}{source}]")


def launch(
    program: Program, memory: Memory, grid: tuple[int, ...], parameters: bytes, shared: int = 0, rules: Rules = NO_MORE
) -> Counts:
    """Runs all blocks; `shared` is the size of dynamic shared memory, after what the kernel declares."""
    machine = Machine(program, memory, parameters, shared, rules)
    x, y, z = (*grid, 1, 1)[:3]
    for number in range(x * y * z):
        machine.block((number % x, number // x % y, number // (x * y)), (x, y, z))
    return machine.counts
