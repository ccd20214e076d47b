"""Compile FlexAttention's forward kernel for sm_80 as torch.compile generates it for an A100, without a GPU.

    python benchmarks/model/flex_kernel.py build/flex && python benchmarks/model/extract.py --triton build/flex

Runs Inductor on fake tensors of a CUDA device whose properties are an A100's, and takes the source of the Triton kernel
that it generates, with the tile that it chooses. It was written for PyTorch 2.13 built for the CPU: it replaces private
functions of that version, and another one may need others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 80, 32)
A100 = SimpleNamespace(
    major=8, minor=0, name="NVIDIA A100-SXM4-40GB", multi_processor_count=108, total_memory=40 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=166912, gcnArchName="",
)  # fmt: skip
ONE_BLOCK = 1 << 30  # flex_attention's block size without a block mask


class _GeneratedError(Exception):
    """The source of a module that Inductor is about to import."""


def generate(head_dim: int) -> str:
    """The module with the kernel that Inductor generates for float16, 4 x 16 heads of 8192 tokens, without a mask."""

    def stop(source: str, *_: Any, **__: Any) -> None:
        raise _GeneratedError(source)

    cuda = {
        "is_available": True, "get_device_capability": (8, 0), "get_device_properties": A100, "current_device": 0,
        "_get_device_properties": A100, "device_count": 1, "_lazy_init": None, "synchronize": None,
        "set_rng_state": None, "get_rng_state": torch.ByteTensor(16), "_exchange_device": 0,
        "_maybe_exchange_device": 0, "is_bf16_supported": True,
    }  # fmt: skip
    driver = SimpleNamespace(get_current_target=lambda: TARGET, get_active_torch_device=lambda: torch.device("cuda:0"))
    triton.runtime.driver.set_active(driver)
    flex_module = sys.modules["torch._higher_order_ops.flex_attention"]
    patches = [mock.patch.object(torch.cuda, name, lambda *_, x=x, **__: x, create=True) for name, x in cuda.items()]
    patches += [mock.patch.object(module, "lazy_init") for module in (joint_graph, post_grad)]
    patches += [
        mock.patch.object(flex_module, "_permute_strides", lambda out, strides: out),
        mock.patch.object(PyCodeCache, "write", stop),
        torch._inductor.config.patch(joint_graph_constant_folding=False, force_disable_caches=True),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(torch.inference_mode())
        stack.enter_context(FakeTensorMode())
        qkv = [torch.empty(4, 16, 8192, head_dim, dtype=torch.float16, device="cuda") for _ in range(3)]
        number = torch.empty(1, 1, 1, dtype=torch.int32, device="cuda")
        index = torch.empty(1, 1, 1, 1, dtype=torch.int32, device="cuda")
        size = (ONE_BLOCK, ONE_BLOCK)
        blocks = BlockMask((1, 1), number, index, None, None, number, index, None, None, size, noop_mask)
        try:
            torch.compile(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask), fullgraph=True)(*qkv, blocks)
        except Exception as error:  # Inductor wraps it
            text = _source_in(error)
            if text is None:
                raise
            return text
    raise RuntimeError("Inductor generated nothing")


def _source_in(error: BaseException | None) -> str | None:
    """The argument of `_GeneratedError` in a chain of exceptions."""
    while error is not None:
        for candidate in (error, getattr(error, "inner_exception", None)):
            if isinstance(candidate, _GeneratedError):
                return str(candidate.args[0])
        error = error.__cause__ or error.__context__
    return None


def compile_kernel(head_dim: int, folder: Path) -> str:
    """Write NAME.cubin and NAME.json as anchor_kernels.py does; returns NAME."""
    found = re.search(r"async_compile.triton\('(\w+)', '''(.*?)'''", generate(head_dim), re.S)
    if found is None:
        raise RuntimeError("the generated module has no Triton kernel")
    name, source = found.groups()
    number = {key: int(re.search(rf"\b{key}\s*(?::\s*tl.constexpr\s*)?=\s*(\d+)", source)[1])  # type: ignore[index]
              for key in ("num_warps", "num_stages", "BLOCK_M", "BLOCK_N")}  # fmt: skip
    types = re.search(r"'signature': (\{.*?\})", source)
    assert types
    signature = dict(re.findall(r"'(\w+)': '(\*?\w+)'", types[1]))
    # Inductor's decorator chooses among configurations when the kernel is launched; there is one.
    path = folder / f"{name}_{head_dim}.py"
    path.write_text(re.sub(r"@triton_heuristics.template\(.*?\n\)\n(?=@triton.jit)", "", source, flags=re.S))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    warps, stages, M, N = number["num_warps"], number["num_stages"], number["BLOCK_M"], number["BLOCK_N"]
    compiled = triton.compile(
        ASTSource(getattr(module, name), signature, {}, aligned), target=TARGET,
        options={"num_warps": warps, "num_stages": stages},
    )  # fmt: skip
    stem = f"flex_attention_{head_dim}_{M}x{N}_{warps}warps_{stages}stages"
    origin = f"PyTorch {torch.__version__}, {stem} of flex_kernel.py"
    about = {"triton": triton.__version__, "warps": warps, "shared": compiled.metadata.shared, "origin": origin,
             "flops": 4 * M * N * head_dim}  # fmt: skip
    (folder / f"{stem}.cubin").write_bytes(compiled.asm["cubin"])
    (folder / f"{stem}.json").write_text(json.dumps(about))
    return stem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where NAME.cubin and NAME.json go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for head_dim in (64, 128):
        print(compile_kernel(head_dim, folder), flush=True)


if __name__ == "__main__":
    main()
