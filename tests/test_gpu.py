"""The kernels on a GPU: test_attention.py's cases, packed sequences, CUDA graphs, large offsets, a second device."""

import pytest
import torch
from packed import assert_packed, cu_seqlens, pack, scales
from support import Case, assert_attends, assert_close, assert_within, make_inputs, pairwise_cases, plain_inputs, truth

from entropy_attn import attention, attention_varlen, entropy_scale, explain

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", pairwise_cases(), ids=str)
def test_matches_float64(case: Case):
    inputs, there = make_inputs(case, device="cuda"), make_inputs(case)
    for name in ("query", "key", "value"):
        assert inputs.arguments[name].stride() == there.arguments[name].stride()
    assert explain(**inputs.arguments).backend == "triton"
    assert_close(case, inputs, attention(**inputs.arguments))


def qkv(N=512, dtype=torch.float16, H=4, D=64, device="cuda"):
    g = torch.Generator().manual_seed(0)
    return [torch.randn((2, H, N, D), generator=g).to(dtype).to(device) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_run_to_run_bitwise_equal(dtype):
    inputs = qkv(1000, dtype)
    first = attention(*inputs, return_entropy=True, return_lse=True)
    for _ in range(5):
        again = attention(*inputs, return_entropy=True, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_graph_capture_and_replay_with_a_tensor_scale():
    inputs = qkv()
    scale = torch.full((), 0.125, device="cuda")
    attention(*inputs, scale=scale, return_entropy=True)  # compile before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(*inputs, scale=scale, return_entropy=True)
    for N in (256, 512, 2048):
        scale.fill_(entropy_scale(N, 512, 64))
        graph.replay()
        assert_attends(captured, *inputs, scale=float(scale))


def test_graph_capture_and_replay_with_num_tokens():
    inputs = qkv()
    num_tokens = torch.full((inputs[0].shape[0],), 2, device="cuda")
    options = {"train_tokens": 512, "train_entropy": 0.5, "num_tokens": num_tokens, "return_entropy": True}
    attention(*inputs, **options)  # compile before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(*inputs, **options)
    for N in (256, 512, 2048):
        num_tokens.fill_(N)
        graph.replay()
        assert_attends(captured, *inputs, scale=entropy_scale(N, 512, 64, 0.5))


@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_packed_sequences(dtype, is_causal, head_dim):
    p = pack((70, 0, 150, 1), (30, 3, 150, 200), 4, 2, head_dim, dtype=dtype, device="cuda", spare=5)
    options = {"is_causal": is_causal, "enable_gqa": True, "return_entropy": True, "return_lse": True}
    for T, H_T in ((None, 0.0), (64, 1.5), ([64, 9, 300, 20], [0.0, 0.5, 1.5, 0.2])):
        tensor = isinstance(T, list)
        given = {"train_tokens": T, "train_entropy": H_T}
        given = {name: torch.tensor(x, device="cuda") if tensor else x for name, x in given.items()}
        assert_packed(attention_varlen(*p.arguments, **given, **options), p, scales(p, T, H_T), is_causal)
    scale = torch.linspace(-0.2, 0.3, 16, device="cuda").view(4, 4)
    assert_packed(attention_varlen(*p.arguments, scale=scale, **options), p, scale.cpu().double(), is_causal)


def test_graph_of_packed_sequences_serves_other_lengths():
    options = {"train_tokens": 64, "return_entropy": True, "return_lse": True}
    total, longest = 160, 150
    p = pack((80, 20, 60), D=64, dtype=torch.float16, device="cuda")
    ends = cu_seqlens(p.lengths_q, "cuda")
    call = (p.query, p.key, p.value, ends, ends, longest, longest)
    attention_varlen(*call, **options)  # compile before the capture
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            captured = attention_varlen(*call, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for lengths in ((80, 20, 60), (0, 150, 10), (33, 0, 64), (1, 2, 3)):
        ends.copy_(cu_seqlens(lengths))
        graph.replay()
        p.lengths_q = p.lengths_k = lengths
        assert sum(lengths) <= total
        assert_packed(captured, p, scales(p, 64))


def test_malformed_ends_of_packed_sequences_stay_inside_the_tensors():
    p = pack((40, 50), H=1, D=64, dtype=torch.float16, device="cuda")
    q, k, v, good, *_ = p.arguments
    for ends in ((-500, 30, 2000), (90, 20, 70), (0, 2**31 - 1, -(2**31)), (0, 10**6, 10**9)):
        bad = torch.tensor(ends, dtype=torch.int32, device="cuda")
        for of_queries, of_keys in ((bad, good), (good, bad), (bad, bad)):
            for longest in (50, 1000):
                result = attention_varlen(q, k, v, of_queries, of_keys, longest, longest, return_entropy=True)
                assert result.out.isfinite().all()
        with pytest.raises(ValueError, match="cu_seqlens_k must"):
            attention_varlen(q, k, v, good, bad, 1000, 1000, check=True)
    assert_packed(attention_varlen(*p.arguments, check=True), p)


def test_tensor_scale_does_not_synchronise():
    inputs, scale = qkv(), torch.full((2, 4), 0.1, device="cuda")
    num_tokens = torch.full((2,), 100, device="cuda")
    attention(*inputs, scale=scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*inputs, scale=scale, return_entropy=True)
        attention(*inputs, train_tokens=64, num_tokens=num_tokens, return_entropy=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_past_2_31():
    # A view into one long buffer can have a batch stride of 2^31 elements.
    N, H, D, far = 128, 2, 64, 2**31
    if torch.cuda.mem_get_info()[0] < 2 * (far + 10**6) + 2**30:
        pytest.skip("needs 6 GiB of free device memory")
    buffer = torch.empty(far + N * H * D, dtype=torch.float16, device="cuda")
    view = buffer.as_strided((2, H, N, D), (far, N * D, D, 1))
    view.copy_(qkv(N, H=H)[0])
    assert_attends(attention(view, view, view, return_entropy=True), view, view, view)


def test_row_strides_past_2_31():
    N, D = 130, 64
    row = 2**31 // 100  # the last rows of a tile lie past element 2^31
    if torch.cuda.mem_get_info()[0] < 2 * row * N + 2**30:
        pytest.skip("needs 7 GiB of free device memory")
    buffer = torch.empty(row * N, dtype=torch.float16, device="cuda")
    view = buffer.as_strided((1, 1, N, D), (row * N, D, row // 8 * 8, 1))
    view.copy_(qkv(N, H=1)[0][:1])
    assert_attends(attention(view, view, view, return_entropy=True), view, view, view)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second device")
def test_second_device():
    inputs = [x.to("cuda:1") for x in qkv()]
    got = attention(*inputs, return_entropy=True)
    assert got.out.device == got.entropy.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_attends(got, *inputs)


@pytest.fixture
def precision():
    """torch.set_float32_matmul_precision. The fixture restores the precision after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_float32_follows_pytorchs_precision_switch(precision):
    inputs = qkv(dtype=torch.float32)
    expected = truth(plain_inputs(*inputs))
    precision("highest")
    assert_within("out", attention(*inputs), expected.out, expected.out_bound)
    precision("high")
    error = (attention(*inputs).cpu() - expected.out).abs().max().item()
    assert error < 5e-3
    if torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0):
        assert error > 1e-5


def test_compiled_by_inductor():
    torch._dynamo.reset()
    fast = torch.compile(lambda q, k, v: attention(q * 2, k, v, train_tokens=256) + 1, fullgraph=True, dynamic=True)
    for N in (128, 200, 333):
        query, key, value = qkv(N)
        expected = truth(plain_inputs(query * 2, key, value, scale=entropy_scale(N, 256, 64)))
        wanted = expected.out + 1
        bound = expected.out_bound + torch.finfo(torch.float16).eps / 2 * wanted.abs()
        assert_within("out", fast(query, key, value), wanted, bound)


def test_float64_says_what_to_do():
    with pytest.raises(ValueError, match="float64; backend='reference'"):
        attention(*qkv(dtype=torch.float64))
