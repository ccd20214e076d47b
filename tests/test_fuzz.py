"""`attention` passes some hundred calls of the fuzzer, and the fuzzer finds mutants of `attention`."""

import subprocess
import sys

import fuzz
import numpy as np
import pytest
import torch
from fuzzing.broken import WAYS
from fuzzing.calls import Call, Scale, Tensor, draw
from fuzzing.oracle import expect
from fuzzing.source import build

import entropy_attn

GPU = torch.cuda.is_available()
original = entropy_attn.attention


def found_in(indices, **options):
    said = []
    kinds = fuzz.fuzz(indices, seed=0, say=said.append, shrinks=3, **options)
    assert not kinds, "\n".join((*said, *(f"{count} {kind}" for kind, count in kinds.items())))


@pytest.mark.parametrize("first", range(0, 450, 75))
def test_cpu(first):
    found_in(range(first, first + 75))


@pytest.mark.parametrize("first", range(0, 48, 12))
def test_triton(first):
    found_in(range(first, first + 12), backend="triton", device="cuda" if GPU else "cpu")


def test_packed_calls(monkeypatch):
    assert not fuzz.fuzz_packed(range(100, 160), seed=0)
    varlen, said = entropy_attn.attention_varlen, []

    def one_key_less(query, key, value, cu_seqlens_q, cu_seqlens_k, *longest, **options):
        fewer = torch.cat([cu_seqlens_k[:1], (cu_seqlens_k[1:] - 1).clamp(min=0)])
        return varlen(query, key, value, cu_seqlens_q, fewer, *longest, **options)

    monkeypatch.setattr(entropy_attn, "attention_varlen", one_key_less)
    kinds = fuzz.fuzz_packed(range(20), seed=0, say=said.append)
    assert sum(kinds.values()) == len(said) > 10
    assert said[0].startswith("packed call ")


def broken_in(way):
    first = 100 * list(WAYS).index(way)
    calls = (draw(0, index, broken=(way,)) for index in range(first, first + 100))
    return next(call for call in calls if call.broken)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_be_wrong(way):
    failure = fuzz.check(broken_in(way))
    assert failure is None, f"{failure.text}\n{failure.program}"


def without_scale(*args, scale=None, **options):
    return original(*args, scale=scale if isinstance(scale, torch.Tensor) else None, **options)


def scale_in_bfloat16(query, key, value, *args, scale=None, train_tokens=None, **options):
    if scale is None and train_tokens is None:
        scale = torch.tensor(query.shape[-1] ** -0.5).bfloat16().item()
    return original(query, key, value, *args, scale=scale, train_tokens=train_tokens, **options)


def causal_off_by_one(query, key, value, *args, is_causal=False, layout="bhnd", **options):
    if is_causal:
        tokens = layout.index("n")
        options["attn_mask"] = torch.ones(query.shape[tokens], key.shape[tokens], dtype=torch.bool).tril(1)
    return original(query, key, value, *args, layout=layout, **options)


def entropy_in_bits(*args, **options):
    result = original(*args, **options)
    if isinstance(result, torch.Tensor) or result.entropy is None:
        return result
    return result._replace(entropy=result.entropy / torch.tensor(2.0).log())


def heads_in_another_order(query, key, value, *args, layout="bhnd", enable_gqa=False, **options):
    heads = layout.index("h")
    H, Hkv = query.shape[heads], max(1, key.shape[heads])
    if enable_gqa and H % Hkv == 0:
        key, value = (torch.cat([x] * (H // Hkv), heads) for x in (key, value))
    return original(query, key, value, *args, layout=layout, enable_gqa=enable_gqa, **options)


def one_mask_for_all_heads(query, key, value, attn_mask=None, *args, **options):
    if type(attn_mask) is torch.Tensor and attn_mask.dim() == 4 and attn_mask.shape[1] > 1:
        attn_mask = attn_mask[:, :1]
    return original(query, key, value, attn_mask, *args, **options)


def hidden_values_leak(query, key, value, *args, **options):
    result = original(query, key, value, *args, **options)
    if isinstance(result, torch.Tensor) and result.numel():
        return result + 0 * value.detach().sum().to(result.dtype)
    return result


def any_dropout(query, key, value, attn_mask=None, dropout_p=0.0, *args, **options):
    return original(query, key, value, attn_mask, 0.0, *args, **options)


MUTANTS = {
    without_scale: "",
    scale_in_bfloat16: "",
    causal_off_by_one: "",
    entropy_in_bits: "entropy",
    heads_in_another_order: "",
    one_mask_for_all_heads: "",
    hidden_values_leak: "out is NaN",
    any_dropout: "dropout_p",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_wrong_implementation_is_found_and_made_small(mutant, monkeypatch):
    """The fuzzer finds the mutant within 400 calls. Its program fails with the mutant and passes without it."""
    for index in range(400):
        call = draw(1, index, broken=tuple(WAYS))
        monkeypatch.setattr(entropy_attn, "attention", mutant)
        failure = fuzz.check(call)
        if failure is None or MUTANTS[mutant] not in failure.kind:
            continue
        monkeypatch.setattr(entropy_attn, "attention", original)
        if fuzz.check(call) is None:
            break
    else:
        pytest.fail("not found")
    monkeypatch.setattr(entropy_attn, "attention", mutant)
    small = fuzz.shrunk(failure)
    assert small.call.B * small.call.heads * small.call.Nq * small.call.Nk <= 12, small.call
    with pytest.raises(AssertionError):
        exec(small.program, {})
    monkeypatch.setattr(entropy_attn, "attention", original)
    exec(small.program, {})


def test_a_program_runs_by_itself():
    call = Call(seed=3, Nq=5, Nk=7, D=8, Dv=4, flags=(True, True))
    program = fuzz.Failure(call, "", "", "assert result.entropy.shape == (1, 1, 5)").program
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", *arguments])
    return fuzz.main()


def test_only_repeats_a_call(monkeypatch, capsys):
    made = []
    check = fuzz.check
    monkeypatch.setattr(fuzz, "check", lambda call: made.append(call) or check(call))
    run_command(monkeypatch, "--calls", "8", "--seed", "5", "--shrinks", "0")
    capsys.readouterr()
    run_command(monkeypatch, "--only", "7", "--seed", "5", "--shrinks", "0")
    assert made[8] == made[7]
    again, printed = {}, capsys.readouterr().out
    exec(printed.split("with torch")[0], again)
    arguments = build(made[7])
    assert arguments.keys() == again["arguments"].keys()
    for name in ("query", "key", "value"):
        torch.testing.assert_close(arguments[name], again["arguments"][name], rtol=0, atol=0, equal_nan=True)
        assert arguments[name].stride() == again["arguments"][name].stride()


def test_what_was_found_is_kept_when_interrupted(monkeypatch, capsys):
    calls = []

    def interrupted(call):
        calls.append(call)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fuzz.Failure(call, "kind", "something is wrong", "")

    monkeypatch.setattr(fuzz, "check", interrupted)
    assert run_command(monkeypatch, "--calls", "100", "--shrinks", "0") == 1
    printed = capsys.readouterr().out
    assert printed.count("something is wrong") == 2
    assert "2 kind" in printed


def test_bounds_are_tight():
    """The bounds of an ordinary float32 call are some hundred units in the last place. Its logits are sums of 64."""
    call = Call(seed=0, B=2, Hkv=2, Nq=64, Nk=128, D=64, Dv=64, scale=Scale("float", 0.125))
    expected = expect(call, build(call))
    for numbers in (expected.out, expected.entropy, expected.lse):
        assert np.median(numbers.bound) < 1e-4
        assert numbers.bound.max() < 5e-4
    large = Call(seed=0, Nq=8, Nk=8, D=64, dtype="bfloat16", query=Tensor("constant", 133120.0))
    assert expect(large, build(large)).out.bound.max() < 10
