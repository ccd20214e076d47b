"""The host overhead of a call. Tracers, profilers and dispatch modes see the call as one operator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import INTERPRETED
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_attn import attention, entropy_scale, explain
from entropy_attn.kernels import tiles

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def host_overhead(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("host_overhead", None)
    import host_overhead

    return host_overhead


@pytest.mark.skipif(torch.cuda.is_available(), reason="the limits are for CPU tensors, in the interpreter")
def test_limits(host_overhead):
    """Calls made by Python in one call of attention(). Microseconds would depend on the machine."""
    calls = host_overhead.count()
    assert calls["cpu"] <= 110
    assert max(n for name, n in calls.items() if name.startswith("launch")) <= 160


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


@INTERPRETED
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_negation_still_to_be_done(which, backend):
    """The memory of a tensor with the negative bit holds negated values. The dispatcher resolves the bit."""
    inputs = [*tensors(), torch.randn(20, 30), torch.tensor(0.3)]
    query, key, value, mask, scale = (torch._neg_view(-x) if i == which else x for i, x in enumerate(inputs))
    given = attention(query, key, value, mask, scale=scale, backend=backend)
    torch.testing.assert_close(given, attention(*inputs[:4], scale=inputs[4], backend=backend), atol=1e-5, rtol=1e-5)


def test_a_compiled_graph_holds_the_operator():
    graphs = []
    torch._dynamo.reset()
    torch.compile(lambda *x: attention(*x), backend=lambda graph, _: graphs.append(graph) or graph)(*tensors())
    assert [n.target for n in graphs[0].graph.nodes if "entropy_attn" in str(n.target)]


def test_explain_takes_sizes_that_are_not_known():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC] * 2 + [DimDynamic.DYNAMIC, DimDynamic.STATIC])
    query, key, value = (
        mode.from_tensor(x, source=ConstantSource(f"x{i}"), symbolic_context=context) for i, x in enumerate(tensors())
    )
    assert explain(query, key, value, train_tokens=64).scale == entropy_scale(30, 64, 16)


@INTERPRETED
@pytest.mark.parametrize("shape", [(20, 30), (1, 30), (20, 1), (2, 1, 30), (1, 20, 30), (2, 1, 1, 30), (1, 2, 20, 30)])
@pytest.mark.parametrize("floating", [False, True])
def test_masks_are_broadcast(shape, floating):
    mask = torch.randn(shape)
    mask = mask if floating else mask > 0
    options = {"return_entropy": True, "backend": "triton"}
    given = attention(*tensors(), mask, **options)
    expanded = attention(*tensors(), mask.expand(2, 2, 20, 30), **options)
    truth = attention(*tensors(), mask, return_entropy=True, backend="reference")
    for result in (given, expanded):
        torch.testing.assert_close(result.out, truth.out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.entropy, truth.entropy, atol=1e-5, rtol=0)


@INTERPRETED
def test_tiles_of_the_user_and_of_the_caller(tmp_path, monkeypatch):
    """The first call of a process reads the user's file of tiles. A tile given by the caller replaces the table's."""
    row = {"block_m": 32, "block_n": 32, "num_warps": 4, "num_stages": 1}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"sm_80": {"float32": {"16": row}}}))
    code = """if True:
        import torch
        from entropy_attn import attention, explain
        from entropy_attn.backends import triton
        from entropy_attn.kernels.tiles import Tile
        query = torch.randn(1, 1, 40, 16)
        launched = []
        class Launcher:
            def __getitem__(self, grid):
                return lambda *arguments, C, **options: launched.append(C.tile)
        triton.attention_forward = Launcher()
        attention(query, query, query, backend="triton")
        triton.forward(query, query, query, None, 0.25, False, False, False, tile=Tile(16, 16, 4, 1))
        print(*launched, explain(query, query, query, backend="triton").config.tile, sep="\\n")
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "ENTROPY_ATTN_TILES": str(path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    mine, given = tiles.Tile(32, 32, 4, 1), tiles.Tile(16, 16, 4, 1)
    assert done.stdout.split("\n") == [str(mine), str(given), str(mine), ""]


def test_whoever_watches_sees_the_operator():
    with Watcher() as watcher:
        attention(*tensors())
    assert torch.ops.entropy_attn.attention.default in watcher.seen
    graph = make_fx(lambda *x: attention(*x))(*tensors())
    assert any(node.target is torch.ops.entropy_attn.attention.default for node in graph.graph.nodes)
    with torch.profiler.profile() as profile:
        attention(*tensors())
    assert "entropy_attn::attention" in {event.key for event in profile.key_averages()}
    with torch.device("meta"):
        query = torch.empty(1, 2, 8, 16)
    assert attention(query, query, query).is_meta


def test_subclasses_that_change_nothing_reach_the_operator():
    class Mine(torch.Tensor):
        pass

    query, key, value = tensors()
    torch.testing.assert_close(attention(query.as_subclass(Mine), key, value), attention(query, key, value))
