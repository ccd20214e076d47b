"""The operator of attention_varlen under torch.library's checks and torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from packed import pack

from entropy_attn import attention_varlen

OPERATOR = torch.ops.entropy_attn.attention_varlen.default


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("scale", ["number", "tensor", "per head", "rule", "rule of each"])
def test_opcheck(scale, flags):
    q, k, v, of_queries, of_keys, max_q, max_k = pack((5, 0, 17), (9, 3, 20), H=4, Hkv=2, Dv=8).arguments
    scale_tensor = {"tensor": torch.rand(3), "per head": torch.rand(3, 4)}.get(scale)
    number, T = 0.3 if scale == "number" else None, 64 if scale == "rule" else None
    rules = (torch.tensor([9, 64, 20]), torch.rand(3)) if scale == "rule of each" else (None, None)
    numbers = (max_q, max_k, number, T, 0.5 if T else 0.0, False, True, *flags, "auto")
    results = torch.library.opcheck(OPERATOR, (q, k, v, of_queries, of_keys, scale_tensor, *rules, *numbers))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


BATCHES = [(5, 70), (9, 64), (130, 3), (33, 34), (77, 200), (256, 1), (19, 23), (100, 50), (8, 15), (31, 99), (2, 4)]


@pytest.mark.parametrize("sequences", ["two", "any number of"])
@pytest.mark.parametrize("options", [{}, {"train_tokens": 64, "return_entropy": True}, {"is_causal": True}], ids=str)
def test_compiles_once_for_all_lengths(options, sequences):
    def layer(*arguments):
        result = attention_varlen(*arguments, **options)
        return (result.out * 2, result.entropy) if "return_entropy" in options else (result + 1,)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    batches = BATCHES if sequences == "two" else [BATCHES[i] * (i + 1) for i in range(len(BATCHES))]
    for lengths in batches:
        arguments = pack(lengths).arguments
        for got, expected in zip(fast(*arguments), layer(*arguments), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1


def test_tensors_of_the_rule_compile_once():
    def layer(T, H_T, *arguments):
        return attention_varlen(*arguments, train_tokens=T, train_entropy=H_T)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for lengths in BATCHES:
        given = (torch.tensor(lengths) + 5, torch.rand(2), *pack(lengths).arguments)
        torch.testing.assert_close(fast(*given), layer(*given))
    assert counter.frame_count == 1
