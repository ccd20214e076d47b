"""A batch of CTAs that run in lockstep: decoding, and the order in which diverged threads go on.

Every instruction becomes a function of the mask of threads that take part, over rows of numbers, one for each thread of
the batch. Threads that diverge form groups; the group at the lowest basic block runs first, and groups that meet at a
block merge. CTAs that run for longer than others are such groups too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .errors import KernelError, PTXError
from .memory import GlobalMemory, LocalMemory
from .operands import TERMINATORS, Immediate, Instruction, Negated, Operand, Symbol
from .options import Options
from .parse import Module
from .registers import Registers
from .scalars import SIZE, U32, U64, Array, Mask
from .shared import SHARED_BASE, SharedMemory

Step = Callable[[Mask], None]
Grid = tuple[int, int, int]


@dataclass
class Block:
    """A basic block. It ends in "next", "bra", "ret", "trap" or "bar"."""

    steps: list[Step] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    end: str = "next"
    last: Instruction | None = None
    guard: Array | None = None
    guard_negated: bool = False
    target: int = 0


class Machine:
    def __init__(
        self, module: Module, ctas: int, threads_per_cta: int, shared_bytes: int, memory: GlobalMemory, options: Options
    ) -> None:
        self.module, self.ctas, self.threads_per_cta, self.options = module, ctas, threads_per_cta, options
        self.threads = ctas * threads_per_cta
        self.warps = self.threads // 32
        self.thread = np.arange(self.threads)
        self.lane = self.thread & 31
        self.cta_of_thread = np.zeros(self.threads, np.int64)  # in the grid
        self.carry = np.zeros(self.threads, np.bool_)  # of extended-precision arithmetic
        self.copy_group = np.zeros(self.threads, np.int64)  # the group that the next cp.async belongs to
        self.parameters: dict[str, bytes] = {}
        self.memory = memory
        self.local = LocalMemory(module.local_size, self.threads)
        symbols = dict(module.local_symbols)
        for name, data in module.global_symbols.items():
            symbols[name] = memory.add(f"the symbol {name}", data.copy()).base
        dynamic = -(-module.static_shared // 16) * 16
        for name, offset in module.shared_symbols.items():
            symbols[name] = SHARED_BASE + (dynamic if offset is None else offset)
        unit = min((size for size in map(_shared_access, module.code) if size), default=4)
        self.shared = SharedMemory(dynamic + shared_bytes, unit, options.check, ctas, threads_per_cta)
        self.specials = self._specials()
        self.registers = Registers(module, self.threads, self.specials, symbols)
        self.blocks, self.block_at = self._decode()

    def _specials(self) -> dict[str, Array]:
        def same(value: int) -> Array:
            return np.full(self.threads, value, U32)

        tid, lane = self.thread % self.threads_per_cta, self.lane.astype(U64)
        specials = {
            "%laneid": lane.astype(U32), "%warpid": (tid >> 5).astype(U32),
            "%nwarpid": same(self.threads_per_cta // 32),
            "%lanemask_eq": (U64(1) << lane).astype(U32), "%lanemask_lt": ((U64(1) << lane) - U64(1)).astype(U32),
            "%lanemask_le": ((U64(2) << lane) - U64(1)).astype(U32),
        }  # fmt: skip
        for axis, threads in zip("xyz", (self.threads_per_cta, 1, 1), strict=True):
            specials[f"%tid.{axis}"] = tid.astype(U32) if axis == "x" else same(0)
            specials[f"%ntid.{axis}"] = same(threads)
            specials[f"%ctaid.{axis}"], specials[f"%nctaid.{axis}"] = same(0), same(0)
        return specials

    # Decoding

    def _decode(self) -> tuple[list[Block], dict[int, int]]:
        code = self.module.code
        starts = {0} | set(self.module.labels.values())
        starts |= {i + 1 for i, ins in enumerate(code) if ins.name in TERMINATORS or _is_barrier(ins)}
        ordered = sorted(start for start in starts if start < len(code))
        block_at = {start: number for number, start in enumerate(ordered)} | {len(code): len(ordered)}
        blocks = []
        for start, end in zip(ordered, [*ordered[1:], len(code)], strict=True):
            block = Block()
            for run in _runs(code[start:end]):
                ins = run[0]
                try:
                    self._decode_run(run, block, block_at)
                except PTXError as error:
                    raise PTXError(f"{ins.op}: {error}; {ins.where()}") from None
                except (IndexError, KeyError, ValueError, TypeError, AttributeError) as error:
                    raise PTXError(f"cannot decode {ins.op}: {error!r}; {ins.where()}") from error
            blocks.append(block)
        return blocks, block_at

    def _decode_run(self, run: list[Instruction], block: Block, block_at: dict[int, int]) -> None:
        from .opcodes import build  # they import this module

        ins = run[0]
        guard = None if ins.guard is None else self.registers.read(ins.guard, "pred")
        if ins.name in TERMINATORS or _is_barrier(ins):
            block.end, block.last = {"exit": "ret", "barrier": "bar"}.get(ins.name, ins.name), ins
            block.guard, block.guard_negated = guard, ins.guard_negated
            if block.end == "bra":
                assert isinstance(ins.args[0], Symbol)
                block.target = block_at[self.module.labels[ins.args[0].name]]
            elif block.end == "bar":
                self._check_barrier(ins)
            return
        step = build(self, run)
        if step is not None:
            block.steps.append(step if guard is None else _guarded(step, guard, ins.guard_negated))
            block.instructions.append(ins)

    def _check_barrier(self, ins: Instruction) -> None:
        numbers = [arg.bits for arg in ins.args if isinstance(arg, Immediate)]
        if ins.guard or len(numbers) != len(ins.args) or numbers[1:] not in ([], [self.threads_per_cta]):
            raise PTXError("only an unconditional barrier of the whole CTA is supported")

    # What opcodes need

    def selected(self, mask: Mask) -> tuple[slice | Array, Array]:
        """An index of the threads that take part, and their numbers."""
        if mask is True:
            return slice(None), self.thread
        index = np.flatnonzero(mask)
        return index, index

    def whole_warps(self, mask: Mask, ins: Instruction) -> None:
        if mask is not True:
            lanes = mask.reshape(-1, 32)
            if (lanes.any(1) != lanes.all(1)).any():
                raise KernelError(f"a part of a warp executes a warp-wide instruction; {ins.where()}")

    def members(self, operand: Operand, ins: Instruction) -> Step:
        """A check that the lanes taking part are those of the member mask of a `.sync` instruction."""
        if isinstance(operand, Immediate) and operand.bits & 0xFFFFFFFF == 0xFFFFFFFF:
            return lambda mask: self.whole_warps(mask, ins)
        member_mask, lane = self.registers.read(operand, "b32"), self.lane.astype(U32)

        def check(mask: Mask) -> None:
            active = self.active(mask)
            in_live_warp = np.repeat(active.reshape(-1, 32).any(1), 32)
            if ((active != ((member_mask >> lane) & U32(1) == 1)) & in_live_warp).any():
                raise KernelError(f"the active lanes are not those of the member mask; {ins.where()}")

        return check

    def active(self, mask: Mask) -> Array:
        return np.ones(self.threads, np.bool_) if mask is True else mask

    def predicate(self, operand: Operand) -> Callable[[], Array]:
        """A function that returns a predicate, negated where the operand says so."""
        if isinstance(operand, Negated):
            negated = self.registers.read(operand.operand, "pred")
            return lambda: ~negated
        plain = self.registers.read(operand, "pred")
        return lambda: plain

    # Running

    def run(self, grid: Grid, first: int, count: int) -> None:
        """Run the CTAs first .. first + count of the grid. Where they are fewer than the batch, the rest rests."""
        cta = first + np.repeat(np.arange(self.ctas), self.threads_per_cta)
        self.cta_of_thread[:] = cta
        x, y, _ = grid
        for axis, index, size in zip("xyz", (cta % x, cta // x % y, cta // (x * y)), grid, strict=True):
            self.specials[f"%ctaid.{axis}"][:] = index
            self.specials[f"%nctaid.{axis}"][:] = size
        self.registers.poison(self.options.poison)
        self.shared.reset(self.options.poison)
        self.local.data[:] = 0xFF
        self.copy_group[:] = 0
        try:
            with np.errstate(all="ignore"):
                self._run(True if count == self.ctas else cta < first + count)
        except KernelError as fault:
            raise KernelError(f"CTAs {first} to {first + count - 1} of {grid}: {fault}") from None

    def _run(self, mask: Mask) -> None:
        groups: dict[int, Mask] = {0: mask}
        waiting: dict[int, Mask] = {}  # at a barrier, by the block behind it
        for _ in range(self.options.max_blocks):
            if not groups:
                if not waiting:
                    return
                groups, waiting = self._pass_barrier(waiting), {}
            number = min(groups)
            mask = groups.pop(number)
            if number == len(self.blocks):
                continue
            block = self.blocks[number]
            self._run_block(block, mask)
            taken, rest = self._branch(block, mask)
            if block.end == "bar":
                _join(waiting, number + 1, mask)
            elif block.end == "trap" and taken is not None:
                assert block.last is not None
                raise KernelError(f"a trap; {block.last.where()}")
            elif block.end in ("bra", "next") and taken is not None:
                _join(groups, block.target if block.end == "bra" else number + 1, taken)
            if rest is not None:
                _join(groups, number + 1, rest)
        raise KernelError(f"more than {self.options.max_blocks} basic blocks: an endless loop?")

    @staticmethod
    def _run_block(block: Block, mask: Mask) -> None:
        for number, step in enumerate(block.steps):
            try:
                step(mask)
            except KernelError:
                raise
            except Exception as error:
                raise RuntimeError(f"the emulator fails at {block.instructions[number].where()}") from error

    @staticmethod
    def _branch(block: Block, mask: Mask) -> tuple[Mask | None, Mask | None]:
        """Who takes the block's end, and who goes on behind it."""
        if block.guard is None:
            return mask, None
        guard = ~block.guard if block.guard_negated else block.guard
        taken = guard.copy() if mask is True else guard & mask
        if not taken.any():
            return None, mask
        rest = ~taken if mask is True else mask & ~taken
        return (taken, rest) if rest.any() else (mask, None)

    def _pass_barrier(self, waiting: dict[int, Mask]) -> dict[int, Mask]:
        """Every thread waits. Those of one CTA must do so at the same barrier."""
        if len(waiting) > 1:
            places = np.zeros(self.ctas, np.int64)
            for mask in waiting.values():
                places += self.active(mask).reshape(self.ctas, -1).any(1)
            if (places > 1).any():
                lasts = [self.blocks[number - 1].last for number in waiting]
                where = " and at ".join(last.where() for last in lasts if last)
                raise KernelError(f"threads of one CTA wait at different barriers: at {where}")
        for mask in waiting.values():
            self.shared.pass_barrier(np.asarray(self.active(mask).reshape(self.ctas, -1).any(1)))
        return waiting


def _shared_access(ins: Instruction) -> int:
    """The bytes of one access to shared memory, at most 8; 0 for what does not touch it."""
    if not ins.has("shared", "shared__cta") or ins.name not in ("ld", "st", "atom", "red", "ldmatrix", "cp"):
        return 0
    if ins.name == "ldmatrix":
        return 8
    if ins.name == "cp":
        return min(8, ins.args[2].bits) if isinstance(ins.args[2], Immediate) else 4
    return min(8, SIZE[ins.type] * int((ins.one_of("v2", "v4", "v8") or "v1")[1:]))


def _is_barrier(ins: Instruction) -> bool:
    return ins.op.startswith(("bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync"))


def _runs(code: list[Instruction]) -> list[list[Instruction]]:
    """One instruction each, but matrix products that follow each other together: they share operands."""
    runs: list[list[Instruction]] = []
    for ins in code:
        if runs and ins.name == "mma" and ins.guard is None and ins.op == runs[-1][0].op and runs[-1][0].guard is None:
            runs[-1].append(ins)
        else:
            runs.append([ins])
    return runs


def _guarded(step: Step, guard: Array, negated: bool) -> Step:
    def guarded(mask: Mask) -> None:
        taken = ~guard if negated else guard.copy()
        if mask is not True:
            taken &= mask
        if taken.all():
            step(True)
        elif taken.any():
            step(taken)

    return guarded


def _join(groups: dict[int, Mask], number: int, mask: Mask) -> None:
    """Put threads to those that are at a block already."""
    before = groups.get(number)
    if before is not None:
        mask = True if before is True or mask is True else before | mask
    groups[number] = True if mask is not True and mask.all() else mask
