"""What a call costs the host, and that the way past PyTorch's dispatcher is the operator's own."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_attn import attention

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def host_overhead(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("host_overhead", None)
    import host_overhead

    return host_overhead


@pytest.mark.skipif(torch.cuda.is_available(), reason="measured with tensors on the CPU, in the interpreter's place")
def test_limits(host_overhead):
    """Twice the limits, as this machine may be slow or busy: the quickest of many short rounds, in up to five tries."""
    for _ in range(5):
        times = {name: min(rounds) for name, rounds in host_overhead.measure(rounds=20, calls=100).items()}
        over = {name: t - 2 * host_overhead.LIMITS["launch"] for name, t in times.items() if name.startswith("launch")}
        over["cpu"] = times["cpu"] - times["sdpa"] - 2 * host_overhead.LIMITS["cpu"]
        if max(over.values()) <= 0:
            return
    pytest.fail(f"microseconds over twice the limit: {over}; load {os.getloadavg()}")


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, n, 16, generator=generator).to(dtype) for n in (20, 30, 30)]


class Watcher(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"return_entropy": True}, {"return_lse": True, "train_tokens": 9}])
def test_dispatched_and_direct_calls_agree(options):
    direct = attention(*tensors(), **options)
    with Watcher() as watcher:
        dispatched = attention(*tensors(), **options)
    assert torch.ops.entropy_attn.attention.default in watcher.seen
    for a, b in zip(direct, dispatched, strict=True) if options else [(direct, dispatched)]:
        assert (a is None and b is None) or torch.equal(a, b)


def test_whoever_watches_sees_the_operator():
    graph = make_fx(lambda *x: attention(*x))(*tensors())
    assert any(node.target is torch.ops.entropy_attn.attention.default for node in graph.graph.nodes)
    with torch.profiler.profile() as profile:
        attention(*tensors())
    assert "entropy_attn::attention" in {event.key for event in profile.key_averages()}
    with torch.device("meta"):
        query = torch.empty(1, 2, 8, 16)
    assert attention(query, query, query).is_meta


def test_subclasses_reach_the_operator():
    class Mine(torch.Tensor):
        seen = ()

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen += (func,)
            return super().__torch_function__(func, types, args, kwargs or {})

    query, key, value = tensors()
    attention(query.as_subclass(Mine), key, value)
    assert any("entropy_attn" in str(func) for func in Mine.seen)


def test_negation_put_off_is_not_lost():
    query, key, value = tensors()
    negated = torch._neg_view(query)
    torch.testing.assert_close(attention(negated, key, value), attention(-query, key, value))
