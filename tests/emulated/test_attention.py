"""The library's kernel on the emulated device: the whole table, and what only the emulator can see or change.

tests/test_gpu.py has the layouts, graphs and offsets past 2^31; it runs on this device too.
Mutants of the kernel and of its launch are in mutations.py and mutants.py (`make mutants`).
"""

import itertools
import math

import pytest
import torch
from support import assert_attends

from entropy_attn import attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 40, 64, 80, 96, 128, 160, 192, 256, 512)  # each of them has a row of its own in the table
MASKS = ("none", "causal", "key padding", "rows", "bias", "key bias", "float32 bias")


def tensors(*shape, dtype=torch.float16, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype).to("cuda") for _ in range(count)]


def mask_of(kind, dtype, B, Nq, Nk):
    """As `attention` is given it, and as the definition is."""
    g = torch.Generator().manual_seed(3)
    if kind == "none":
        return {}, None
    if kind == "causal":
        return {"is_causal": True}, torch.ones(Nq, Nk, dtype=torch.bool).tril()
    shape = (B, 1, 1, Nk) if kind.startswith("key") else (B, 1, Nq, Nk)
    hidden = torch.rand(shape, generator=g) < 0.3
    mask = ~hidden
    if "bias" in kind:
        mask = torch.randn(shape, generator=g).masked_fill(hidden, -math.inf)
        mask = mask if kind == "float32 bias" else mask.to(dtype)
    return {"attn_mask": mask.to("cuda")}, mask


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("entropy", [False, True], ids=["plain", "entropy"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table(dtype, head_dim, entropy, mask, device):
    """Two heads of two samples; whole blocks of keys, a block at the edge, and a tile of queries that is not full."""
    B, H, Nq, Nk = 1, 2, 70, 150
    (query,) = tensors(B, H, Nq, head_dim, dtype=dtype, count=1)
    key, value = tensors(B, H, Nk, head_dim, dtype=dtype, count=2, seed=1)
    before = [x.clone() for x in (query, key, value)]
    given, meant = mask_of(mask, dtype, B, Nq, Nk)
    result = attention(query, key, value, **given, return_entropy=entropy, return_lse=entropy)
    assert len(device.launches) == 1
    assert_attends(result, query, key, value, meant)
    assert all(torch.equal(x, y) for x, y in zip(before, (query, key, value), strict=True))


def laid_out(kind, B, H, N, D):
    """float16 query, key and value, (B, H, N, D), as users have them in memory."""
    if kind == "contiguous":
        return tensors(B, H, N, D)
    if kind == "heads inside tokens":
        return [x.transpose(1, 2) for x in tensors(B, N, H, D)]
    if kind == "fused":
        return list(tensors(B, N, 3, H, D, count=1)[0].permute(2, 0, 3, 1, 4).unbind(0))
    if kind == "odd rows":
        return [x[..., 1:] for x in tensors(B, H, N, D + 1)]
    if kind == "one element off":
        (buffer,) = tensors(3 * B * H * N * D + 1, count=1)
        return list(buffer[1:].view(3, B, H, N, D).unbind(0))
    raise ValueError(kind)


ALIGNED = ("contiguous", "heads inside tokens", "fused")


def test_other_strides_sizes_and_alignments_from_one_cached_kernel(device):
    """The kernel that was compiled for the first call serves later ones, and is right for them."""
    kernels = {}
    for kind, (B, H, N) in itertools.product((*ALIGNED, "odd rows", "one element off"), ((2, 2, 100), (1, 3, 64))):
        query, key, value = laid_out(kind, B, H, N, 64)
        result = attention(query, key, value, return_entropy=True)
        assert_attends(result, query, key, value)
        kernels.setdefault("aligned" if kind in ALIGNED else kind, set()).add(device.launches[-1].kernel.ptx)
    assert len(kernels["aligned"]) == 1
    assert all(len(paths) == 1 for paths in kernels.values())
    assert kernels["odd rows"] != kernels["aligned"] != kernels["one element off"]


@pytest.mark.parametrize("kind", ["odd rows", "one element off"])
@pytest.mark.parametrize("aligned_first", [True, False])
def test_alignment_decides_the_kernel_whatever_came_before(kind, aligned_first):
    cases = ["contiguous", kind]
    for each in cases if aligned_first else reversed(cases):
        query, key, value = laid_out(each, 1, 2, 80, 32)
        assert_attends(attention(query, key, value), query, key, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "rows", "key bias"])
def test_nothing_depends_on_what_registers_and_shared_memory_held(mask, dtype, device):
    query, key, value = tensors(1, 2, 90, 40, dtype=dtype)
    given, _ = mask_of(mask, dtype, 1, 90, 90)
    results = []
    for poison in (0, 1, 2):
        with device.with_options(poison=poison):
            results.append(attention(query, key, value, **given, return_entropy=True, return_lse=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "rows", "bias"])
@pytest.mark.parametrize("seed", [0, 1])
def test_approximate_functions_at_their_documented_error(seed, mask, dtype, device):
    query, key, value = tensors(1, 2, 90, 64, dtype=dtype)
    given, meant = mask_of(mask, dtype, 1, 90, 90)
    with device.with_options(approximation=1.0, seed=seed):
        result = attention(query, key, value, **given, return_entropy=True, return_lse=True)
    assert_attends(result, query, key, value, meant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_cores_that_truncate(dtype, device):
    """As hardware adds, and not as the definition does: the entropy keeps its error in nats."""
    query, key, value = tensors(1, 2, 90, 64, dtype=dtype)
    exact = attention(query, key, value, return_entropy=True)
    with device.with_options(tensor_core="truncating"):
        result = attention(query, key, value, return_entropy=True)
    assert not torch.equal(result.out, exact.out) or dtype == torch.bfloat16
    assert_attends(result, query, key, value)


def test_a_graph_records_launches_and_runs_none(device):
    query, key, value = tensors(1, 2, 100, 64)
    attention(query, key, value, train_tokens=64, return_entropy=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(query, key, value, train_tokens=64, return_entropy=True)
    assert device.launches[-1].captured
    assert captured.out.isnan().all()
    assert captured.entropy.isnan().all()
    scale = math.sqrt(math.log(100) / math.log(64) / 64)
    for seed in (5, 6):  # new numbers in the memory that was captured
        for old, new in zip((query, key, value), tensors(1, 2, 100, 64, seed=seed), strict=True):
            old.copy_(new)
        graph.replay()
        assert_attends(captured, query, key, value, scale=scale)


@pytest.mark.parametrize("axis", ["batch", "head", "row", "row of values"])
def test_offsets_past_2_31(axis):
    """Views into one long buffer, of which only what is touched takes memory."""
    far, shape = 2**31 + 8, (1 + (axis == "batch"), 1 + (axis == "head"), 140, 32)
    row = -(-far // 138 // 8) * 8 if axis.startswith("row") else 32
    strides = (far, far, row, 1)
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert elements > 2**31
    view = torch.empty(elements, dtype=torch.float16, device="cuda").as_strided(shape, strides)
    near = tensors(*shape, count=1)[0]
    view.copy_(near)
    query, key = (near, near) if axis == "row of values" else (view, view)
    assert_attends(attention(query, key, view, return_entropy=True), near, near, near)


def test_a_wrong_length_is_seen(device):
    """The emulator's own alarm: the kernel reads past a key tensor whose memory ends sooner than its shape says."""
    from emulator import KernelError

    query, key, value = tensors(1, 1, 64, 64)
    attention(query, key, value)
    numbers = key._emulated_numbers.untyped_storage().data_ptr()
    region = device.memory.find(device.address(numbers))
    data, region.data = region.data, region.data[:-128]
    try:
        with pytest.raises(KernelError, match="out of bounds"):
            attention(query, key, value)
    finally:
        region.data = data
