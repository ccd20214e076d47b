"""Disassembly of a kernel (NVIDIA's SASS, AMD's amdgcn): its main loop, and the kinds of instructions in it.

The counts are static: each instruction of the loop counts once, as a warp issues it once in a pass. A packed or dual
instruction counts once. A predicated instruction counts whether or not its predicate holds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# The group of an instruction, by the start of its name. The first pattern that matches decides.
GROUPS = {
    "matrix": r"[HIBDQO]G?MMA|UTC[A-Z]*MMA|v_s?mfma|v_smfmac|v_s?wmm",
    "exponential": r"MUFU\.EX2|v_exp_",
    "shuffle": r"SHFL|REDUX|ds_b?permute|ds_swizzle|v_permlane|v_\w+_dpp",
    "spill": r"LDL|STL|scratch_",
    "shared memory": r"LDS|STS|ATOMS|LDTM|STTM|UTCCP|ds_",  # the last three are tensor memory
    "barrier": r"BAR|DEPBAR|LDGDEPBAR|SYNCS|MEMBAR|FENCE|WARP|ARRIVE|UTCBAR|BSSY|BSYNC|BMOV|B2R|ERRBAR|CCTL|"
    r"s_barrier|s_wait|buffer_(gl|inv|wb)",
    "global memory": r"LDG|STG|UTMA|UBLKCP|ATOM|RED|(LD|ST)\b|global_|buffer_|flat_|s_load",
    "conversion": r"F2|I2F|HADD2\.F32|v_cvt_|v_pack_|v_fma_mix",
    "float multiply-add": r"[FHD](FMA|MUL|ADD)|v_(pk_|dual_)?(fma|mul|add|sub|mac|dot2)\w*_f(16|32|64)",
    "float compare": r"[FH](MNMX|SEL|SET)|v_(pk_|dual_)?(max|min)\w*_f(16|32)|v_cmpx?_\w+_f(16|32)|v_(dual_)?cndmask",
    "integer and move": r"U?(I(ADD|MAD|ABS|MNMX|SETP|DP)|LEA|LOP|SHF|SEL|MOV|PRMT|SGXT|FLO|POPC|BREV|BMSK|PLOP|LDC)|"
    r"VIADD|VIMNMX|VOTE|ELECT|[PR]2U?[PR]|UP2UR|UR2UP|CS2U?R|S2U?R|"
    r"[sv]_(?!rcp|log|sqrt|rsq|div_|branch|cbranch|nop|delay|endpgm|setprio|sleep|clause|sendmsg)",
    "other": "",
}
ASYNCHRONOUS_COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP|global_load_lds|buffer_load\w*.*\blds\b")
WARP_GROUP_MATRIX = re.compile(r"[HIQ]GMMA")

_LABEL = re.compile(r"([.$\w]+):")
_NVIDIA = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?(?P<text>[A-Z][^;]*);")
_AMD = re.compile(r"\s+(?P<text>(?:s|v|ds|global|buffer|flat|scratch)_\w[^;\n]*)")


@dataclass(frozen=True)
class Instruction:
    """One instruction, the label it may jump to, and whether execution may continue with the next instruction."""

    text: str
    target: str | None = None
    continues: bool = True

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def group(self) -> str:
        return next(group for group, pattern in GROUPS.items() if re.match(pattern, self.text))


def disassemble(kernel: CompiledKernel) -> str:
    """The machine code of a compiled kernel as text, with labels."""
    if "cubin" not in kernel.asm:
        return kernel.asm["amdgcn"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "--print-code", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a listing, and for each label the index of the instruction that follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _NVIDIA.match(line):
            instructions.append(_nvidia(match["text"].strip(), match["predicate"]))
        elif match := _AMD.match(line):
            instructions.append(_amd(match["text"].strip()))
    return instructions, labels


def _nvidia(text: str, predicate: str | None) -> Instruction:
    name, _, operands = text.partition(" ")
    name = name.split(".")[0]
    if name == "BRA":  # the predicate may also be the first operand
        target = re.search(r"`\(([^)]+)\)", operands)
        always = predicate is None and operands.strip().startswith("`")
        return Instruction(text, target[1] if target else None, not always)
    return Instruction(text, None, predicate is not None or name not in ("EXIT", "RET"))


def _amd(text: str) -> Instruction:
    name, _, operands = text.partition(" ")
    if name.startswith(("s_branch", "s_cbranch")):
        return Instruction(text, operands.strip(), name != "s_branch")
    return Instruction(text, None, name not in ("s_endpgm", "s_setpc_b64"))


def find_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[frozenset[int]]:
    """The natural loops of the control-flow graph, each as the indices of its instructions.

    A depth-first search finds the back edges: jumps to an instruction on the current path, which is the loop's head.
    The body is every instruction that reaches the back edge without passing the head. So a body may have forward jumps,
    and parts elsewhere in the listing (ptxas moves waits there). A loop with two entries would not be recognised; ptxas
    and LLVM make none.
    """
    followers: list[list[int]] = []
    for index, instruction in enumerate(instructions):
        jump = [labels[instruction.target]] if instruction.target in labels else []
        following = [*jump, *([index + 1] if instruction.continues else [])]
        followers.append([n for n in following if n < len(instructions)])
    before: dict[int, list[int]] = defaultdict(list)
    closing: dict[int, list[int]] = defaultdict(list)
    seen: set[int] = set()
    path: set[int] = set()
    stack = [(0, False)] if instructions else []
    while stack:
        index, leaving = stack.pop()
        if leaving:
            path.remove(index)
        elif index not in seen:
            seen.add(index)
            path.add(index)
            stack.append((index, True))
            for follower in followers[index]:
                before[follower].append(index)
                if follower in path:
                    closing[follower].append(index)
                else:
                    stack.append((follower, False))
    loops = []
    for head, ends in closing.items():
        body, waiting = {head}, list(ends)
        while waiting:
            index = waiting.pop()
            if index not in body:
                body.add(index)
                waiting += before[index]
        loops.append(frozenset(body))
    return loops


def main_loop(listing: str) -> list[Instruction]:
    """The innermost loop with the most matrix instructions, or multiply-adds where there are none.

    The kernel's second loop, over the last keys, may have as many. Then the loop with more asynchronous copies is
    taken, and after that the first in the listing.
    """
    instructions, labels = parse(listing)
    loops = find_loops(instructions, labels)
    for work in ("matrix", "float multiply-add"):
        amount = {loop: sum(instructions[i].group == work for i in loop) for loop in loops}
        working = [loop for loop in loops if amount[loop]]
        innermost = [loop for loop in working if not any(other < loop for other in working)]
        if innermost:
            best = max(innermost, key=lambda loop: (amount[loop], _copies(instructions, loop), -min(loop)))
            return [instructions[i] for i in sorted(best)]
    raise ValueError("the machine code has no loop with matrix instructions or multiply-adds")


def _copies(instructions: list[Instruction], loop: frozenset[int]) -> int:
    return sum(bool(ASYNCHRONOUS_COPY.match(instructions[i].text)) for i in loop)


def mix(loop: list[Instruction]) -> dict[str, int]:
    """The number of instructions in each group."""
    counts = Counter(instruction.group for instruction in loop)
    return {group: counts[group] for group in GROUPS}
