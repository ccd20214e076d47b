"""attention_varlen with bad input: what is refused, and malformed ends of sequences that nobody checked."""

import math

import pytest
import torch
from packed import pack
from support import INTERPRETED, normal

from entropy_attn import attention_varlen
from entropy_attn.backends import Packed
from entropy_attn.scale import LengthRule


def ends(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


def replaced(**changes):
    """The arguments of a valid call with sequences of 3 and 5 queries and 4 and 2 keys, some of them replaced."""
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, pack((3, 5), (4, 2), H=4, D=8).arguments, strict=True)) | changes


T2 = torch.tensor([9, 9])
ERRORS = {
    "query not a tensor": ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    "key with 4 axes": ({"key": torch.zeros(1, 4, 6, 8)}, ValueError, r"key must have 3 axes \(total, H, D\), got"),
    "integer query": ({"query": torch.zeros(8, 4, 8).int()}, ValueError, "query must be of float16.*got torch.int32"),
    "other dtype": ({"value": torch.zeros(6, 4, 8).half()}, ValueError, "value must have the dtype of query"),
    "other device": ({"key": torch.zeros(6, 4, 8, device="meta")}, ValueError, "key must be on the device of query"),
    "head dim 0": ({"query": torch.zeros(8, 4, 0)}, ValueError, "query must have a head dim of at least 1"),
    "head dims": ({"key": torch.zeros(6, 4, 16)}, ValueError, "key must have the head dim of query, 8, got 16"),
    "rows of value": ({"value": torch.zeros(7, 4, 8)}, ValueError, "tokens and heads of key, 6 and 4, got 7 and 4"),
    "heads": (
        {"key": torch.zeros(6, 2, 8), "value": torch.zeros(6, 2, 8)}, ValueError, "query, 4, got 2 .*enable_gqa"
    ),
    "heads no multiple": (
        {"key": torch.zeros(6, 3, 8), "value": torch.zeros(6, 3, 8), "enable_gqa": True}, ValueError, "got 4 and 3"
    ),
    "cu_seqlens a list": ({"cu_seqlens_q": [0, 3, 8]}, TypeError, "cu_seqlens_q must be a tensor, got list"),
    "cu_seqlens int64": (
        {"cu_seqlens_k": ends(0, 4, 6, dtype=torch.int64)}, ValueError, "cu_seqlens_k must be an int32 .*torch.int64"
    ),
    "cu_seqlens elsewhere": (
        {"cu_seqlens_q": ends(0, 3, 8).to("meta")}, ValueError, "cu_seqlens_q must be on the device of query, cpu"
    ),
    "cu_seqlens of 2 axes": ({"cu_seqlens_q": ends(0, 3, 8)[None]}, ValueError, r"must have shape \(S \+ 1,\)"),
    "cu_seqlens of 0 ends": ({"cu_seqlens_q": ends()}, ValueError, r"cu_seqlens_q must have shape \(S \+ 1,\).*\(0,\)"),
    "numbers of sequences": ({"cu_seqlens_k": ends(0, 6)}, ValueError, r"shape of cu_seqlens_q, \(3,\), got \(2,\)"),
    "begins at 1": ({"cu_seqlens_q": ends(1, 3, 8)}, ValueError, "cu_seqlens_q must begin at 0, got 1"),
    "falls": (
        {"cu_seqlens_k": ends(0, 4, 3)}, ValueError, "cu_seqlens_k must not fall, got 4 and then 3 at 1 and 2"
    ),
    "overruns": (
        {"cu_seqlens_q": ends(0, 4, 9)}, ValueError, "cu_seqlens_q must end at most at the rows of query, 8, got 9"
    ),
    "keys overrun": ({"cu_seqlens_k": ends(0, 4, 7)}, ValueError, "at most at the rows of key, 6, got 7"),
    "longer than max": (
        {"max_seqlen_q": 4}, ValueError, "max_seqlen_q must be at least the longest sequence of cu_seqlens_q, 5, got 4"
    ),
    "keys longer than max": ({"max_seqlen_k": 3}, ValueError, "max_seqlen_k must be .* cu_seqlens_k, 4, got 3"),
    "negative max": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0, got -1"),
    "max None": ({"max_seqlen_q": None}, TypeError, "max_seqlen_q must be an int, got None"),
    "max a float": ({"max_seqlen_q": 5.0}, TypeError, "max_seqlen_q must be an int, got float"),
    "is_causal an int": ({"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
    "check an int": ({"check": 1}, TypeError, "check must be a bool, got int"),
    "enable_gqa None": ({"enable_gqa": None}, TypeError, "enable_gqa must be a bool, got NoneType"),
    "return_entropy an int": ({"return_entropy": 1}, TypeError, "return_entropy must be a bool"),
    "return_lse an int": ({"return_lse": 1}, TypeError, "return_lse must be a bool"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'triton'.*got 'cuda'"),
    "scale and T": ({"scale": 0.1, "train_tokens": 9}, ValueError, "scale and train_tokens cannot be given together"),
    "scale a string": ({"scale": "0.1"}, TypeError, "scale must be a float or a tensor, got str"),
    "scale infinite": ({"scale": math.inf}, ValueError, "scale must be finite .* got inf"),
    "scale of half": ({"scale": torch.ones(2).half()}, ValueError, "scale must be a float32 .*got torch.float16"),
    "scale elsewhere": ({"scale": torch.ones(2, device="meta")}, ValueError, "scale must be on the device of query"),
    "scale shape": ({"scale": torch.ones(4)}, ValueError, r"\(S,\) = \(2,\) or \(S, H\) = \(2, 4\), got \(4,\)"),
    "T too small": ({"train_tokens": 1}, ValueError, "train_tokens must be at least 2, got 1"),
    "T a float": ({"train_tokens": 9.0}, TypeError, "train_tokens must be an int or a tensor, got float"),
    "T of floats": ({"train_tokens": torch.ones(2)}, ValueError, "train_tokens must be .* of int32 or int64, got"),
    "T elsewhere": ({"train_tokens": T2.to("meta")}, ValueError, "train_tokens must be on the device of query"),
    "T of 3 sequences": ({"train_tokens": torch.tensor([9] * 3)}, ValueError, r"train_tokens must have shape \(S,\)"),
    "H_T without T": ({"train_entropy": 0.5}, ValueError, "train_entropy needs train_tokens, got train_entropy=0.5"),
    "H_T a tensor without T": ({"train_entropy": torch.ones(2)}, ValueError, "train_entropy=a tensor alone"),
    "H_T too large": ({"train_tokens": 9, "train_entropy": 2.2}, ValueError, r"train_entropy must be below ln\(train_"),
    "H_T negative": ({"train_tokens": T2, "train_entropy": -1.0}, ValueError, "train_entropy must be a finite number"),
    "H_T a string": ({"train_tokens": 9, "train_entropy": "1"}, TypeError, "train_entropy must be a float or "),
    "H_T of half": (
        {"train_tokens": 9, "train_entropy": torch.ones(2).half()}, ValueError, "float32 or float64, got torch.float16"
    ),
    "H_T shape": ({"train_tokens": 9, "train_entropy": torch.ones(())}, ValueError, r"train_entropy must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case):
    changes, error, message = ERRORS[case]
    attention_varlen(**replaced())
    with pytest.raises(error, match=message):
        attention_varlen(**replaced(**changes))


ENDS = [
    (-5, 3, 200), (0, 500, 30), (7, 3, 10), (0, -1, 30), (2**31 - 1, -(2**31), 2**31 - 1), (-(2**31), 2**31 - 1, 40),
    (30, 0, 29), (0, 0, 31),
]  # fmt: skip
LENGTH, GUARD, MARK = 30, 70, 12345.0


@INTERPRETED
@pytest.mark.parametrize("longest", [0, 9, 30, 500])
@pytest.mark.parametrize("malformed", ENDS, ids=str)
@pytest.mark.parametrize("where", ["queries", "keys", "both"])
def test_malformed_ends_reach_no_other_memory(where, malformed, longest, monkeypatch):
    """Around the inputs lies NaN, which would reach the results. Around the results lies a mark, which must stay.
    What the ends mean after clamping is the same for the kernel and for the loop over sequences."""
    from entropy_attn.backends import reference, triton

    def guarded(fill, *rest):
        whole = torch.full((LENGTH + 2 * GUARD, *rest), fill)
        return whole, whole[GUARD : GUARD + LENGTH]

    whole, rows = zip(guarded(MARK, 1, 16), guarded(MARK), guarded(MARK), strict=True)
    outputs = (rows[0].zero_(), rows[1].zero_()[None], rows[2].fill_(-math.inf)[None])
    monkeypatch.setattr(triton, "new_varlen_outputs", lambda *_: outputs)
    query, key, value = (guarded(math.nan, 1, 16)[1].copy_(normal(LENGTH, 1, 16, seed=i)) for i in range(3))
    good = ends(0, 10, 30)
    of_queries = good if where == "keys" else ends(*malformed)
    of_keys = good if where == "queries" else ends(*malformed)
    packed = Packed(query, key, value, of_queries, of_keys, longest, longest)
    triton.forward_varlen(packed, LengthRule(50, 0.0), False, True, True)
    for inner, buffer in zip(rows, whole, strict=True):
        assert (buffer[:GUARD] == MARK).all()
        assert (buffer[GUARD + LENGTH :] == MARK).all()
        assert not inner.isnan().any()
    wanted = reference.forward_varlen(packed, LengthRule(50, 0.0), False, True, True)
    for got, expected in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("malformed", ENDS, ids=str)
def test_malformed_ends_are_refused_on_the_cpu(malformed, backend):
    q, k, v, good, _, longest, _ = pack((10, 20)).arguments
    for of_queries, of_keys, name in ((ends(*malformed), good, "q"), (good, ends(*malformed), "k")):
        with pytest.raises(ValueError, match=f"cu_seqlens_{name} must"):
            attention_varlen(q, k, v, of_queries, of_keys, longest, longest, backend=backend)


def test_errors_of_values_survive_compilation():
    fast = torch.compile(attention_varlen, backend="aot_eager", fullgraph=True, dynamic=True)
    q, k, v, ends, _, longest, _ = pack((5, 7)).arguments
    fast(q, k, v, ends, ends, longest, longest)
    with pytest.raises(ValueError, match="cu_seqlens_k must begin at 0, got 1"):
        fast(q, k, v, ends, ends + 1, longest, longest)
