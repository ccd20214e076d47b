"""Compile the kernel ahead of time for any architecture, and read what the compiler made of it. Needs no GPU.

python -m entropy_attn.kernels.aot --architecture sm_80 --dtype float16 --head-dim 64
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .attention import attention_forward
from .config import Config, configure
from .tiles import HEAD_DIMS
from .varlen import attention_varlen_forward

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# Bytes of shared memory one program may have (CUDA C Programming Guide, table of technical specifications; RDNA3 and
# CDNA3 ISA documents).
SHARED_MEMORY = {
    "sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10,
    "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10, "gfx1100": 64 << 10,
}  # fmt: skip
_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_ALIGNED = [["tt.divisibility", 16]]
# The type of the argument Scale, by `Config.scale`.
_SCALES: dict[str, Any] = {
    "number": "fp32", "per_head": "*fp32", "per_query": "*fp32", "num_tokens": ("*i64", "fp32", "fp32"),
    "lengths": ("fp32", "fp32"), "lengths_per_sequence": ("*fp32", "*fp32"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Resources:
    """Per thread: registers and bytes of stack that registers spill to. Per program: bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def compile_kernel(
    architecture: str, dtype: str, head_dim: int, value_dim: int | None = None, **options: Any
) -> CompiledKernel:
    """`compile_config` of `configure`, whose options these are."""
    return compile_config(architecture, dtype, configure(architecture, dtype, head_dim, value_dim, **options))


def compile_config(
    architecture: str, dtype: str, config: Config, mask_dtype: str | None = None, packed: bool = False
) -> CompiledKernel:
    """The binary that a launch with this configuration runs, for tensors aligned to 16 bytes and a mask contiguous in
    its keys. mask_dtype: of a floating mask, by default `dtype`. packed: the kernel for packed sequences."""
    kernel = attention_varlen_forward if packed else attention_forward
    element = _TYPES[dtype]
    pointees = {
        "Q": element, "K": element, "V": element, "Out": element,
        "Entropy": "fp32" if config.entropy else None,
        "Lse": "fp32" if config.lse else None,
    }  # fmt: skip
    if packed:
        pointees |= {"Cu_seqlens_q": "i32", "Cu_seqlens_k": "i32"}
    else:
        pointees["Mask"] = {"none": None, "boolean": "u8", "floating": _TYPES[mask_dtype or dtype]}[config.mask]
    constants: dict[str, Any] = {name: None for name, pointee in pointees.items() if pointee is None} | {"C": config}
    if config.mask != "none":
        constants["stride_mn"] = 1
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointees:
            signature[name] = f"*{pointees[name]}"
            attributes[(index,)] = _ALIGNED
        elif name == "Scale":
            signature[name] = kind = _SCALES[config.scale]
            parts = [((index, i), x) for i, x in enumerate(kind)] if isinstance(kind, tuple) else [((index,), kind)]
            attributes |= {path: _ALIGNED for path, x in parts if x.startswith("*")}
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=_target(architecture), options=config.launch_options)


def resources(kernel: CompiledKernel) -> Resources:
    """Registers, spills and shared memory of a binary."""
    if "cubin" in kernel.asm:
        registers, spills = _cubin_usage(kernel.asm["cubin"])
    else:
        text = kernel.asm["amdgcn"]
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        spills = max(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text))
    return Resources(registers, spills, kernel.metadata.shared)


def _target(architecture: str) -> GPUTarget:
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=ARCHITECTURES, nargs="+", default=["sm_80"])
    parser.add_argument("--dtype", choices=_TYPES, nargs="+", default=["float16"])
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, nargs="+", default=[64], metavar="D")
    parser.add_argument("--mask", choices=("none", "boolean", "floating"), default="none")
    parser.add_argument("--mask-dtype", choices=_TYPES, help="of a floating mask (default: that of query)")
    parser.add_argument("--mask-per-query", action="store_true", help="the mask differs from query to query")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--packed", action="store_true", help="the kernel for packed sequences, with λ from lengths")
    arguments = parser.parse_args()
    if arguments.packed and arguments.mask != "none":
        parser.error(f"--packed takes no mask, got --mask {arguments.mask}")
    for architecture, dtype, head_dim, entropy in itertools.product(
        arguments.architecture, arguments.dtype, arguments.head_dim, (False, True)
    ):
        config = configure(
            architecture, dtype, head_dim, entropy=entropy, is_causal=arguments.causal, mask=arguments.mask,
            mask_per_query=arguments.mask_per_query, scale="lengths" if arguments.packed else "number",
        )  # fmt: skip
        kernel = compile_config(architecture, dtype, config, arguments.mask_dtype, arguments.packed)
        row: dict[str, Any] = {
            "architecture": architecture, "dtype": dtype, "head_dim": head_dim, "entropy": entropy,
            "tile": dataclasses.astuple(config.tile),
            **dataclasses.asdict(resources(kernel)),
            "shared_limit": SHARED_MEMORY[architecture],
        }  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
