"""attention_varlen: packed sequences of different lengths, with λ from the length of each."""

import math

import pytest
import torch
from packed import DTYPES, Pack, assert_packed, pack, random_call, scales
from support import BACKENDS, INTERPRETED, normal

from entropy_attn import attention, attention_varlen

BOTH = {"return_entropy": True, "return_lse": True}
LENGTHS = {
    "many": ((3, 130, 1, 64), (3, 130, 1, 64)),
    "cross": ((7, 40, 2), (130, 1, 33)),
    "first empty": ((0, 5, 9), (0, 5, 9)),
    "last empty": ((5, 9, 0), (5, 9, 0)),
    "inner empty": ((5, 0, 0, 9), (5, 0, 0, 9)),
    "only empty": ((0,), (0,)),
    "no keys": ((5, 4, 3), (2, 0, 6)),
    "no queries": ((5, 0, 3), (2, 7, 6)),
    "one": ((70,), (70,)),
    "no sequence": ((), ()),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths, is_causal, backend):
    p = pack(*LENGTHS[lengths])
    result = attention_varlen(*p.arguments, is_causal=is_causal, backend=backend, **BOTH)
    assert_packed(result, p, is_causal=is_causal)


@pytest.mark.parametrize("H", [0, 2])
@pytest.mark.parametrize("spare", [0, 6])
def test_no_rows_and_no_heads(spare, H, backend):
    for lengths in ((), (0,), (0, 0)):
        p = pack(lengths, H=H, spare=spare)
        assert_packed(attention_varlen(*p.arguments, backend=backend, **BOTH), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "Hkv", "D", "Dv"), [(2, 2, 40, 40), (4, 2, 16, 24), (3, 1, 80, 8)])
def test_heads_and_head_dims(H, Hkv, D, Dv, dtype, backend):
    p = pack((5, 70, 0, 30), (9, 70, 3, 140), H, Hkv, D, Dv, dtype)
    result = attention_varlen(*p.arguments, enable_gqa=Hkv != H, train_tokens=50, backend=backend, **BOTH)
    assert_packed(result, p, scales(p, 50))


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_only_what_is_asked_for_is_returned(flags, backend):
    p = pack((5, 9))
    asked = dict(zip(BOTH, flags, strict=True))
    result = attention_varlen(*p.arguments, backend=backend, **asked)
    assert_packed(result, p)
    if any(flags):
        assert (result.entropy is not None, result.lse is not None) == flags
    else:
        assert isinstance(result, torch.Tensor)


def test_rows_in_no_sequence(backend):
    p = pack((5, 70), spare=3)
    for tensor in (p.query, p.key, p.value):
        tensor[-3:] = math.nan
    assert_packed(attention_varlen(*p.arguments, backend=backend, **BOTH), p)


def test_a_longer_max_seqlen_changes_nothing(backend):
    p = pack((5, 70, 33))
    *tensors, max_q, max_k = p.arguments
    assert_packed(attention_varlen(*tensors, max_q + 200, max_k + 200, backend=backend, **BOTH), p)


@pytest.mark.parametrize("T", [64, [64, 2, 10**6, 300]], ids=["T", "T of each"])
@pytest.mark.parametrize("H_T", [0.0, 0.5, [0.0, 0.1, 2.0, 0.6]], ids=["", "H_T", "H_T of each"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_scale_from_the_length_of_each_sequence(T, H_T, integer, backend):
    p = pack((5, 70, 64, 2))
    given_T = torch.tensor(T, dtype=integer) if isinstance(T, list) else T
    given_H = torch.tensor(H_T) if isinstance(H_T, list) else H_T
    result = attention_varlen(*p.arguments, train_tokens=given_T, train_entropy=given_H, backend=backend, **BOTH)
    assert_packed(result, p, scales(p, T, H_T))


@INTERPRETED
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_the_trained_length_has_the_trained_scale_bit_for_bit(tensor):
    lengths = (2, 63, 77, 130)
    p = pack(lengths, D=40)
    plain = attention_varlen(*p.arguments, backend="triton", **BOTH)
    for i, T in enumerate(lengths):
        for H_T in (0.0, 0.3):
            given = {"train_tokens": T, "train_entropy": H_T}
            if tensor:
                given = {name: torch.tensor([x] * len(lengths)) for name, x in given.items()}
            rule = attention_varlen(*p.arguments, backend="triton", **given, **BOTH)
            assert torch.equal(plain.out[p.sequences[i][0]], rule.out[p.sequences[i][0]])
            assert torch.equal(plain.lse[:, p.sequences[i][0]], rule.lse[:, p.sequences[i][0]])


def test_sequences_too_short_for_the_rule_have_scale_0(backend):
    """N of 0 and 1; and a train_entropy above ln N."""
    p = pack((4, 3, 5, 2), (1, 0, 7, 130))
    result = attention_varlen(*p.arguments, train_tokens=50, train_entropy=2.5, backend=backend, **BOTH)
    assert_packed(result, p, scales(p, 50, 2.5))
    assert (result.lse[:, :4].abs() < 1e-30).all()
    torch.testing.assert_close(result.entropy[:, 7:12], torch.full((2, 5), math.log(7)))


def test_elements_that_have_no_rule_give_nan(backend):
    p = pack((5, 6, 7, 8, 9))
    T = torch.tensor([1, 0, 20, 20, 20])
    H_T = torch.tensor([0.0, 0.0, 3.5, -0.5, 0.0])
    result = attention_varlen(*p.arguments, train_tokens=T, train_entropy=H_T, backend=backend, **BOTH)
    assert result.out[:26].isnan().all()
    assert result.lse[:, :26].isnan().all()
    assert result.out[26:].isfinite().all()


@pytest.mark.parametrize("shape", [(), (4,), (4, 3)], ids=str)
def test_scale_tensors(shape, backend):
    p = pack((5, 70, 0, 30), H=3)
    scale = normal(*shape, seed=5)
    wanted = (scale[:, None] if len(shape) == 1 else scale).expand(4, 3).double()
    assert_packed(attention_varlen(*p.arguments, scale=scale, backend=backend, **BOTH), p, wanted)
    turned = normal(*shape[::-1], seed=5).mT if len(shape) == 2 else scale
    wanted = (turned[:, None] if len(shape) == 1 else turned).expand(4, 3).double()
    assert_packed(attention_varlen(*p.arguments, scale=turned, backend=backend, **BOTH), p, wanted)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_scale_numbers(scale, backend):
    p = pack((5, 70))
    wanted = torch.full((2, 2), scale, dtype=torch.float64)
    for is_causal in (False, True):
        result = attention_varlen(*p.arguments, scale=scale, is_causal=is_causal, backend=backend, **BOTH)
        assert_packed(result, p, wanted, is_causal)


@pytest.mark.parametrize("memory", ["fused", "heads first", "transposed", "odd", "every other", "expanded heads"])
def test_strides(memory, backend):
    p = pack((5, 70, 9), D=24, spare=2)
    total, H, D = p.query.shape

    def laid_out(x, i):
        if memory == "fused":
            view = torch.empty(total, 3, H, D)[:, i]
        elif memory == "heads first":
            view = torch.empty(H, total, D).transpose(0, 1)
        elif memory == "transposed":
            view = torch.empty(total, D, H).mT
        elif memory == "odd":
            view = torch.empty(total * H * (D + 1) + 1)[1:].view(total, H, D + 1)[..., 1:]
        elif memory == "every other":
            view = torch.empty(2 * total, H, D)[1::2]
        else:
            return x[:, :1].expand(total, H, D)
        return view.copy_(x)

    p.query, p.key, p.value = (laid_out(x, i) for i, x in enumerate((p.query, p.key, p.value)))
    q, k, v, of_queries, of_keys, *longest = p.arguments
    of_queries = torch.stack([of_queries, of_queries], 1)[:, 0]
    assert_packed(attention_varlen(q, k, v, of_queries, of_keys, *longest, backend=backend, **BOTH), p)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("outputs", [{}, BOTH], ids=["plain", "both"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"scale": 0.3}, {"train_tokens": 64}, {"train_tokens": 300, "train_entropy": 0.4},
], ids=str)  # fmt: skip
def test_equals_a_loop_over_the_sequences_bit_for_bit(options, dtype, outputs, backend):
    p = pack((5, 70, 1, 64), (9, 70, 20, 130), H=4, Hkv=2, Dv=24, dtype=dtype)
    got = attention_varlen(*p.arguments, enable_gqa=True, backend=backend, **options, **outputs)
    for queries, keys in p.sequences:
        inputs = (p.query[queries][None], p.key[keys][None], p.value[keys][None])
        one = attention(*inputs, enable_gqa=True, layout="bnhd", backend=backend, **options, **outputs)
        if not outputs:
            assert torch.equal(got[queries], one[0])
            continue
        assert torch.equal(got.out[queries], one.out[0])
        assert torch.equal(got.entropy[:, queries], one.entropy[0])
        assert torch.equal(got.lse[:, queries], one.lse[0])


def test_tensors_of_the_rule_equal_a_loop_over_the_sequences():
    p = pack((5, 70, 64))
    T, H_T = torch.tensor([64, 9, 300]), torch.tensor([0.1, 0.0, 2.0])
    got = attention_varlen(*p.arguments, train_tokens=T, train_entropy=H_T)
    for (queries, keys), t, h in zip(p.sequences, T.tolist(), H_T.tolist(), strict=True):
        inputs = (p.query[queries][None], p.key[keys][None], p.value[keys][None])
        assert torch.equal(got[queries], attention(*inputs, layout="bnhd", train_tokens=t, train_entropy=h)[0])


def test_autocast(backend):
    p = pack((5, 70))
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_varlen(*p.arguments, train_tokens=64, backend=backend, **BOTH)
    p.query, p.key, p.value = (x.bfloat16() for x in (p.query, p.key, p.value))
    assert_packed(got, p, scales(p, 64))


@pytest.mark.parametrize("name", ["query", "key", "value", "scale", "train_entropy"])
def test_derivatives_are_refused(name):
    p = pack((5, 7))
    given = dict(zip(("query", "key", "value"), p.arguments, strict=False))
    if name == "scale":
        given["scale"] = torch.ones(2)
    elif name == "train_entropy":
        given |= {"train_entropy": torch.zeros(2), "train_tokens": 9}

    def run(x):
        rest = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), p.arguments[3:], strict=True))
        return attention_varlen(**given | {name: x} | rest)

    with pytest.raises(ValueError, match=f"^{name} requires grad, and attention has no derivative"):
        run(given[name].clone().requires_grad_())
    with torch.no_grad():
        run(given[name].clone().requires_grad_())
    with pytest.raises(ValueError, match=f"^{name} has a tangent"):
        torch.func.jvp(run, (given[name],), (torch.ones_like(given[name]),))


def test_a_sequence_sees_no_other(backend):
    """Other numbers in one sequence change no bit of another."""
    p = pack((5, 70, 33))
    before = attention_varlen(*p.arguments, train_tokens=64, backend=backend, **BOTH)
    queries, keys = p.sequences[1]
    changed = Pack(p.query.clone(), p.key.clone(), p.value.clone(), p.lengths_q, p.lengths_k)
    changed.query[queries], changed.key[keys], changed.value[keys] = math.nan, math.inf, math.nan
    after = attention_varlen(*changed.arguments, train_tokens=64, backend=backend, **BOTH)
    for rows in (p.sequences[0][0], p.sequences[2][0]):
        assert torch.equal(before.out[rows], after.out[rows])
        assert torch.equal(before.entropy[:, rows], after.entropy[:, rows])
        assert torch.equal(before.lse[:, rows], after.lse[:, rows])


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed, backend):
    p, options, scale = random_call(seed)
    result = attention_varlen(*p.arguments, **options, backend=backend, **BOTH)
    assert_packed(result, p, scale, options["is_causal"])
