"""torch.cuda and tensors on the emulated device."""

import pytest
import torch


def test_what_is_said_of_it(device):
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.get_device_capability() == (8, 0)
    properties = torch.cuda.get_device_properties(torch.device("cuda", 0))
    assert (properties.major, properties.multi_processor_count) == (8, 108)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.get_device_properties(1)
    with torch.cuda.device(0):
        torch.cuda.synchronize()


def test_tensors_know_their_device():
    x = torch.arange(12.0).view(3, 4).to("cuda")
    assert type(x) is torch.Tensor
    assert x.device == torch.device("cuda:0")
    assert x.is_cuda
    assert not x.cpu().is_cuda
    assert torch.equal(x.cpu(), torch.arange(12.0).view(3, 4))
    assert (x.t()[1:] @ x).device == x.device
    assert torch.zeros(3, device="cuda").sum().item() == 0
    assert torch.tensor([1, 2], device="cuda").tolist() == [1, 2]
    assert "emulated" in repr(x)


def test_views_share_memory():
    x = torch.zeros(4, 6, device="cuda")
    column = x[:, 2]
    column.fill_(3.0)
    assert x.cpu()[:, 2].tolist() == [3.0] * 4
    assert column.data_ptr() == x.data_ptr() + 8
    assert x[1].data_ptr() == x.data_ptr() + 24
    x[0] = torch.arange(6.0).to("cuda")
    assert x[0, 5].item() == 5


def test_addresses_are_like_those_of_the_caching_allocator():
    a, b = torch.empty(10, device="cuda"), torch.empty(10, device="cuda")
    assert a.data_ptr() % 512 == b.data_ptr() % 512 == 0
    assert abs(a.data_ptr() - b.data_ptr()) > 2**32


def test_strides_survive():
    x = torch.zeros(2, 3, 5, 8).to("cuda").permute(0, 2, 1, 3)
    assert x.stride() == (120, 8, 40, 1)
    odd = torch.zeros(2, 9, device="cuda")[:, 1:]
    assert odd.stride() == (9, 1)
    assert odd.data_ptr() % 16 == 4
    assert torch.empty_like(x).stride() == (120, 8, 40, 1)
    assert x.new_empty(2, 2).stride() == (2, 1)


def test_memory_is_freed(device):
    before = len(device.memory.regions)
    x = torch.zeros(100, device="cuda")
    y = x[3:]
    assert len(device.memory.regions) == before + 1
    del x
    assert len(device.memory.regions) == before + 1
    del y
    assert len(device.memory.regions) == before


def test_fresh_memory_is_poison():
    assert torch.empty(10, device="cuda").isnan().all()


def test_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device="cuda") + torch.zeros(3)
    assert (torch.zeros(3, device="cuda") + torch.tensor(1.0)).sum().item() == 3


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: torch.equal(x, x),
                                  lambda x: x.nonzero(), lambda x: bool(x.any())])  # fmt: skip
def test_synchronisation_is_noticed(wait):
    x = torch.zeros(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait(x)
        x.add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wait(x)


def test_graphs_record_and_replay():
    """Operators of PyTorch: nothing is waited for, and a replay reads and writes the same memory."""
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x * 2).view(2, 2)
        z = y + 1
        y.t().add_(10)
        with pytest.raises(RuntimeError, match="capturing"):
            z.sum().item()
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert z.unique().tolist() == [2 * value + 1]
        assert y.unique().tolist() == [2 * value + 10]
