"""Triton's specialisation of a launch: many lengths, layouts and masks share few compiled kernels."""

import math
import warnings

import pytest
import torch

pytest.importorskip("triton")

from entropy_attn import attention, attention_varlen
from entropy_attn.backends import triton as backend
from entropy_attn.kernels.attention import attention_forward
from entropy_attn.kernels.config import Config
from entropy_attn.kernels.varlen import attention_varlen_forward

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="CPU tensors reach the launch only in the interpreter"
)


def names_of(kernel) -> tuple[str, ...]:
    return kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount]


NAMES, PACKED_NAMES = names_of(attention_forward), names_of(attention_varlen_forward)
# The arguments that the kernels are not specialised on. Triton never specialises on floats.
NEVER = {n for n in NAMES if n.startswith("stride_") and n != "stride_mn"} | {"H", "Hkv", "Nq", "Nk"}
PACKED_NEVER = {n for n in PACKED_NAMES if n.startswith(("stride_", "total_", "max_seqlen_"))} | {"H", "Hkv"}


def kind(name: str, value):
    """The part of an argument that selects the compiled kernel."""
    if isinstance(value, tuple):
        return tuple(kind(name, x) for x in value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if value is None or name in NEVER | PACKED_NEVER or isinstance(value, float):
        return value is None
    return value if isinstance(value, Config) or value in (0, 1) else (value % 16 == 0)


def kernels_of(calls, monkeypatch, function=attention, names=NAMES) -> set:
    seen = set()

    class Launcher:
        def __getitem__(self, grid):
            def launch(*arguments, C, num_warps, num_stages, enable_fp_fusion):
                given = dict(zip(names, arguments, strict=False)) | {"C": C}
                seen.add(tuple((name, kind(name, x)) for name, x in sorted(given.items())))

            return launch

    monkeypatch.setattr(backend, f"{function.__name__}_forward", Launcher())
    for call in calls:
        function(**call, backend="triton")
    return seen


def qkv(N=64, D=16, B=2, H=2):
    return dict(zip(("query", "key", "value"), torch.zeros(3, B, H, N, D), strict=True))


def test_the_kernel_is_told_what_not_to_look_at():
    if not hasattr(attention_forward, "kwargs"):
        pytest.skip("this version of Triton's interpreter does not keep what the decorator was given")
    assert set(attention_forward.kwargs["do_not_specialize"]) == NEVER
    assert set(attention_varlen_forward.kwargs["do_not_specialize"]) == PACKED_NEVER


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_many_lengths_take_two_kernels(dtype, monkeypatch):
    """One kernel is for masks whose rows start at multiples of 16 elements. The other is for all other masks."""
    calls = [
        {**qkv(N), "attn_mask": torch.ones(*shape, N, N).to(dtype)}
        for N in (16, 20, 30, 33, 48, 60, 63, 64, 100)
        for shape in ((), (2, 1), (1, 2), (2, 2))
    ]
    assert len(kernels_of(calls, monkeypatch)) == 2


def test_key_padding_masks_take_two_kernels(monkeypatch):
    calls = [{**qkv(N), "attn_mask": torch.ones(2, 1, 1, N, dtype=torch.bool)} for N in (16, 20, 30, 33, 48, 64, 100)]
    assert len(kernels_of(calls, monkeypatch)) == 2


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_of_axes_of_one_do_not_count(axis, monkeypatch):
    """Slicing can leave an odd stride on an axis of size 1. Such a stride does not make loads narrow."""
    shape = [2, 2, 64, 16]
    shape[axis] = 1
    plain = torch.zeros(shape)
    strides = list(plain.stride())
    strides[axis] = 7
    odd = torch.zeros(plain.numel() + 7).as_strided(shape, strides)
    seen = kernels_of([dict.fromkeys(("query", "key", "value"), x) for x in (plain, odd)], monkeypatch)
    assert len(seen) == 1
    assert dict(next(iter(seen)))["C"].row_unit == 8


def test_lengths_heads_and_strides_take_one_kernel(monkeypatch):
    calls = [
        {**qkv(N, H=H, B=B), "return_entropy": True, "scale": 1 / math.sqrt(N)}
        for N in (16, 33, 64) for H in (1, 2, 5) for B in (1, 3)
    ]  # fmt: skip
    assert len(kernels_of(calls, monkeypatch)) == 1


def test_numbers_of_tokens_take_one_kernel(monkeypatch):
    calls = [
        {**qkv(B=B), "train_tokens": T, "train_entropy": H_T, "num_tokens": torch.full((B,), N)}
        for B in (1, 2, 5) for T in (2, 16, 64) for H_T in (0.0, 0.5) for N in (1, 48, 64)
    ]  # fmt: skip
    assert len(kernels_of(calls, monkeypatch)) == 1


@pytest.mark.parametrize("scale", ["number", "rule", "rules", "tensor"])
def test_packed_sequences_of_any_lengths_take_one_kernel(scale, monkeypatch):
    calls = []
    for lengths in ((16, 48), (33, 1), (1, 1), (64, 0), (5, 6, 7), (15,) * 15):
        for H in (1, 2, 5):
            S = len(lengths)
            given = dict(zip(("query", "key", "value"), torch.zeros(3, sum(lengths), H, 16), strict=True))
            ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            given |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": max(lengths)}
            given |= {"max_seqlen_k": max(lengths), "return_entropy": True}
            tokens, entropy = torch.full((S,), 64), torch.full((S,), 0.5)
            given |= {
                "number": {"scale": 1 / math.sqrt(S)},
                "rule": {"train_tokens": 64 + S, "train_entropy": S / 20},
                "rules": {"train_tokens": tokens, "train_entropy": entropy},
                "tensor": {"scale": torch.ones(S, H)},
            }[scale]
            calls.append(given)
    assert len(kernels_of(calls, monkeypatch, attention_varlen, PACKED_NAMES)) == 1


@pytest.mark.parametrize("takes_architecture", [True, False])
@pytest.mark.parametrize(("release", "is_right"), [("12.8", False), ("12.9", False), ("13.0", True), ("13.1", True)])
def test_an_assembler_that_miscompiles_for_hopper_is_warned_of(release, is_right, takes_architecture, monkeypatch):
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    text = f"Cuda compilation tools, release {release}, V{release}.93"
    version = (lambda arch=80: text) if takes_architecture else (lambda: text)
    monkeypatch.setattr(compiler, "get_ptxas_version", version)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        backend._check_assembler()
    assert len(said) == (0 if is_right else 1)
    if said:
        assert f"ptxas {release} " in str(said[0].message)
        assert "TRITON_PTXAS_PATH" in str(said[0].message)


def test_the_assembler_of_this_triton_is_understood():
    pytest.importorskip("triton.backends.nvidia.compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend._check_assembler()
