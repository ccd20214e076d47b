"""Take the main loops of the anchors out of libraries and compiled kernels, into benchmarks/model/loops/.

    python benchmarks/model/extract.py --flash-attention vllm_flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so
    python benchmarks/model/extract.py --torch site-packages/torch/lib/libtorch_cuda.so
    python benchmarks/model/anchor_kernels.py build/triton && python benchmarks/model/extract.py --triton build/triton
    python benchmarks/model/flex_kernel.py build/flex && python benchmarks/model/extract.py --triton build/flex

validate.py reads the files in that folder and needs none of this. Of Triton's many tiles, those that the model finds
fastest are kept, for the tutorials take the fastest they measure.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # where sass.py and occupancy.py are

import sass
from a100 import decode, loops
from a100.estimate import Code, estimate
from tqdm import tqdm

KEPT = 2
# Of FlashAttention-2's forward kernels: float16, no dropout, whole tiles, without and with a causal mask.
# (head dim, queries, keys of a tile, bytes of shared memory that its launcher asks for)
FLASH_ATTENTION = [(64, 128, 128, 49152), (128, 128, 64, 65536)]


def flash_attention(library: Path, name: str, origin: str) -> None:
    cuobjdump = str(sass.TOOLS / "cuobjdump")
    command = [cuobjdump, "-arch", "sm_80", "--dump-resource-usage", str(library)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for head_dim, queries, keys, shared in FLASH_ATTENTION:
        for causal in (False, True):
            flags = f"ELb0ELb{int(causal)}ELb0ELb0ELb1ELb1ELb0ELb0E"
            traits = f"Li{head_dim}ELi{queries}ELi{keys}ELi4E"
            pattern = rf"Function (\S*flash_fwd_kernel\S*half_t\S*{traits}S\d_E{flags}\S*):\s+REG:(\d+)"
            found = re.search(pattern, usage)
            if not found:
                sys.exit(f"{library} has no forward kernel of FlashAttention-2 for sm_80 with {traits} and {flags}")
            command = [cuobjdump, "-arch", "sm_80", "-sass", "-fun", found[1], str(library)]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            code = Code(tuple(decode.main_loop(listing)), 4, int(found[2]), shared)
            loop = loops.Loop(code, 4.0 * queries * keys * head_dim, origin)
            loops.save(loops.FOLDER / f"{name}_{head_dim}{'_causal' if causal else ''}.txt", loop)


def triton_kernels(folder: Path) -> None:
    """The fastest tiles of each kernel in a folder that anchor_kernels.py or flex_kernel.py wrote."""
    best: dict[str, list[tuple[float, str, loops.Loop]]] = {}
    for path in tqdm(sorted(folder.glob("*.cubin")), desc=str(folder)):
        about = json.loads(path.with_suffix(".json").read_text())
        version = about["triton"]
        code = Code(tuple(decode.main_loop(decode.disassemble(path))), about["warps"], registers(path), about["shared"])
        if not code.programs:
            continue
        origin = about.get("origin", f"Triton {version}, {path.stem} of anchor_kernels.py")
        loop = loops.Loop(code, about["flops"], origin)
        kernel = re.match(r"(flex_)?attention_\d+|matmul", path.stem)
        assert kernel
        speed = estimate(code, loop.flops, runs=4).speed
        best.setdefault(f"triton_{version}_{kernel[0]}", []).append((speed, path.stem, loop))
    for kernel_name, found in best.items():
        for old in loops.matching(f"{kernel_name}_*"):
            (loops.FOLDER / f"{old}.txt").unlink()
        for speed, tile, loop in sorted(found, key=lambda item: -item[0])[:KEPT]:
            name = f"{kernel_name}_{tile.rsplit('_', 3)[1]}_{'_'.join(tile.rsplit('_', 2)[1:])}"
            loops.save(loops.FOLDER / f"{name}.txt", loop)
            print(f"{name}: {speed:.0f} TFLOP/s, of {len(found)} tiles")


def registers(cubin: Path) -> int:
    command = [str(sass.TOOLS / "cuobjdump"), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"REG:(\d+)", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flash-attention", type=Path, metavar="SO", help="of the wheel vllm-flash-attn 2.6.2")
    parser.add_argument("--torch", type=Path, metavar="SO", help="libtorch_cuda.so of a PyTorch built for CUDA")
    parser.add_argument("--torch-version", default="2.8.0", help="which it is (default: %(default)s)")
    parser.add_argument(
        "--triton", type=Path, nargs="+", metavar="FOLDER", help="of anchor_kernels.py or flex_kernel.py"
    )
    arguments = parser.parse_args()
    if not (arguments.flash_attention or arguments.torch or arguments.triton):
        parser.error("name a library or a folder; validate.py needs neither")
    for path in [arguments.flash_attention, arguments.torch, *(arguments.triton or [])]:
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    if arguments.flash_attention:
        origin = "wheel vllm-flash-attn 2.6.2, BSD 3-Clause: FlashAttention-2 compiled with fast math"
        flash_attention(arguments.flash_attention, "flash_attention", origin)
    if arguments.torch:
        origin = f"wheel torch {arguments.torch_version}, BSD 3-Clause: FlashAttention-2 as PyTorch compiles it"
        flash_attention(arguments.torch, "torch_flash_attention", origin)
    for folder in arguments.triton or []:
        triton_kernels(folder)


if __name__ == "__main__":
    main()
