"""Which way of the CPU backend runs a call, and that both are right where one takes over from the other."""

import pytest
import torch

from entropy_attn import attention
from entropy_attn.backends import cpu


@pytest.mark.parametrize("head_dim", [1, 4, 8, 16, 17])
@pytest.mark.parametrize("offset", [0.0, 3.0, 40.0, -40.0])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_small_heads(head_dim, offset, layout, monkeypatch):
    """Up to 16 channels, and while no row's lse is far from 0, the entropy comes from PyTorch's own kernel."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 70, head_dim) if layout == "bhnd" else (2, 70, 3, head_dim)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    query[..., 0] = 1.0
    key[..., 0] += offset / 0.3
    options = {"scale": 0.3, "layout": layout, "return_entropy": True, "return_lse": True}
    blocks, blockwise = [], cpu._blockwise
    monkeypatch.setattr(cpu, "_blockwise", lambda *call: blocks.append(call) or blockwise(*call))
    ours = attention(query, key, value, **options)
    assert bool(blocks) == (head_dim > 16 or abs(offset) > 15)
    truth = attention(query.double(), key.double(), value.double(), backend="reference", **options)
    torch.testing.assert_close(ours.out, truth.out.float(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.entropy, truth.entropy, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.lse, truth.lse, atol=1e-5, rtol=1e-6)
    assert (ours.entropy >= 0).all()
