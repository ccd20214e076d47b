"""Tensors on the emulated device: PyTorch sees `cuda:0`; their numbers lie in memory that kernels can address.

Such a tensor has a CPU tensor over the device's memory. Operators of PyTorch run on the CPU tensors, and what they
return is moved to the device's memory. Operators of others get the emulated tensors, as on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from .device import Device

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
EMPTY = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip
# The host waits for the device in these.
SYNCHRONISING = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten.is_nonzero.default,
}  # fmt: skip
# Tensors on the CPU and on the device may meet in these.
MIXED = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default, aten.set_.source_Tensor,
}  # fmt: skip


def is_device(device: Any) -> bool:
    """C++ takes emulated tensors for ones on "meta": without CUDA it has no guard for CUDA devices."""
    return device is not None and torch.device(device).type in ("cuda", "meta")


def numbers_of(x: Any) -> torch.Tensor | None:
    """The CPU tensor that holds an emulated tensor's numbers; None for what is not on the device."""
    return getattr(x, "_emulated_numbers", None) if isinstance(x, torch.Tensor) else None


def emulated(numbers: torch.Tensor) -> torch.Tensor:
    """A tensor on the device. For C++ it is one on "meta", of the same shape; see `patch_tensor`."""
    storage = torch.empty(numbers.untyped_storage().nbytes(), dtype=torch.uint8, device="meta").untyped_storage()
    x = torch.empty(0, dtype=numbers.dtype, device="meta")
    _place(x, numbers, storage)
    x._emulated_numbers = numbers  # type: ignore[attr-defined]
    return x.requires_grad_() if numbers.requires_grad else x


def _place(x: torch.Tensor, like: torch.Tensor, storage: torch.UntypedStorage) -> None:
    with torch.no_grad():
        x.set_(storage, like.storage_offset(), like.size(), like.stride())  # type: ignore[call-overload]


def patch_tensor(device: Device) -> None:
    """What Python sees of a tensor on the device. The class stays torch.Tensor, as on a GPU."""
    plain = torch._C.TensorBase

    def seen(name: str, value: Callable[[torch.Tensor], Any]) -> property:
        descriptor = getattr(plain, name)
        return property(lambda x: descriptor.__get__(x) if numbers_of(x) is None else value(x))

    def data_ptr(x: torch.Tensor) -> int:
        """The address that a kernel gets."""
        numbers = numbers_of(x)
        if numbers is None:
            return plain.data_ptr(x)
        start = numbers.untyped_storage().data_ptr()
        if not numbers.numel() or not start:
            return 0
        return device.address(start) + int(numbers.storage_offset()) * numbers.element_size()

    def get_device(x: torch.Tensor) -> int:
        return int(plain.get_device(x)) if numbers_of(x) is None else 0

    plain_repr = torch.Tensor.__repr__

    def representation(x: torch.Tensor, **contents: Any) -> str:
        numbers = numbers_of(x)
        return plain_repr(x, **contents) if numbers is None else f"{plain_repr(numbers)} on the emulated {DEVICE}"

    def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain.to(x, *map(_with_index, args), **{name: _with_index(y) for name, y in kwargs.items()})

    def cuda(x: torch.Tensor, *unused: Any, **also_unused: Any) -> torch.Tensor:
        return plain.to(x, DEVICE)

    def through_host(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """torch.tensor and its like make their tensor where no dispatch mode sees it."""

        def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            if not is_device(device):
                return function(*args, device=device, **kwargs)
            return function(*args, **kwargs).to(DEVICE)

        return make

    torch.tensor, torch.as_tensor = through_host(torch.tensor), through_host(torch.as_tensor)
    for name, replacement in {
        "to": to, "cuda": cuda, "device": seen("device", lambda x: DEVICE), "is_cuda": seen("is_cuda", lambda x: True),
        "is_meta": seen("is_meta", lambda x: False), "data_ptr": data_ptr, "get_device": get_device,
        "__repr__": representation,
    }.items():  # fmt: skip
        setattr(torch.Tensor, name, replacement)


class Runtime:
    """What PyTorch does with the device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.sync_debug_mode = 0
        self.mode = _Dispatch(self)

    def install(self) -> None:
        patch_tensor(self.device)
        self.mode.__enter__()

    def synchronise(self, what: str) -> None:
        """The host is about to wait for the device."""
        if self.device.capture is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if self.sync_debug_mode == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace not in ("aten", "prim", "prims"):
            with self.mode:  # the operator's own kernel, which sees the device
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if numbers_of(x) is not None]
        asked = kwargs.get("device")
        on_device = is_device(asked) if asked is not None else bool(here)
        if func in EMPTY and on_device:
            return self._empty(func, args, kwargs)
        self._check(func, tensors, here, on_device)
        numbers = tree_map(_numbers, args), tree_map(_numbers, kwargs)
        result = func(*numbers[0], **numbers[1])
        if not on_device:
            return result
        known = {id(numbers_of(x)): x for x in here}
        plain = {id(x) for x in tensors if numbers_of(x) is None}

        def wrap(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or id(x) in plain:
                return x
            if id(x) not in known:
                return emulated(self._moved(x))
            if x.size() != known[id(x)].size() or x.stride() != known[id(x)].stride():  # transpose_ and its like
                _place(known[id(x)], x, known[id(x)].untyped_storage())
            return known[id(x)]

        wrapped = tree_map(wrap, result)
        if self.device.capture is not None:
            self._record(func, *numbers, result, wrapped)
        return wrapped

    def _check(self, func: Any, tensors: list[Any], here: list[Any], on_device: bool) -> None:
        strangers = [x for x in tensors if numbers_of(x) is None and x.dim()]
        if here and strangers and func not in MIXED:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
                f"({func})"
            )
        to_host = func is aten._to_copy.default and here and not on_device
        to_host = to_host or (func is aten.copy_.default and here and numbers_of(tensors[0]) is None)
        if to_host or (func in SYNCHRONISING and here):
            self.synchronise(str(func))

    def _empty(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """Memory as it is found: NaN, so that what nobody writes is seen."""
        meta = func(*args, **(kwargs | {"device": "meta"}))
        return emulated(self._allocate(meta.untyped_storage().nbytes(), meta))

    def _allocate(self, nbytes: int, like: torch.Tensor) -> torch.Tensor:
        """A tensor over new memory of the device, with the strides of another."""
        if not nbytes:
            return torch.empty(0, dtype=like.dtype).as_strided(like.size(), like.stride())
        memory = torch.frombuffer(self.device.allocate(nbytes), dtype=torch.uint8)
        flat = torch.empty(0, dtype=like.dtype).set_(memory.untyped_storage())  # type: ignore[call-overload]
        return flat.as_strided(like.size(), like.stride(), like.storage_offset())

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor in the device's memory: itself if it is there already."""
        storage = x.untyped_storage()
        if not storage.nbytes() or self.device.owns(storage.data_ptr()):
            return x
        moved = self._allocate(storage.nbytes(), x)
        ctypes.memmove(moved.untyped_storage().data_ptr(), storage.data_ptr(), storage.nbytes())
        return moved

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any, wrapped: Any) -> None:
        """Into the graph being captured: do it again, into the memory that the result has now."""
        outputs = [x for x in map(numbers_of, tree_flatten(wrapped)[0]) if x is not None]
        inputs = {
            x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)
        }
        in_place = func._schema.is_mutable
        if not in_place and all(x.untyped_storage().data_ptr() in inputs for x in outputs):
            return  # a view

        def replay() -> None:
            again = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, torch.Tensor)]
            for output, x in zip(outputs, again, strict=True):
                if output is not x and not in_place:
                    output.copy_(x)

        assert self.device.capture is not None
        self.device.capture.append(replay)


def _numbers(x: Any) -> Any:
    numbers = numbers_of(x)
    if numbers is not None:
        return numbers
    return CPU if isinstance(x, torch.device) and is_device(x) else x


class _Dispatch(TorchDispatchMode):
    """Sees every operator call of the thread that installed the device."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.runtime.dispatch(func, args, kwargs or {})


def _with_index(x: Any) -> Any:
    """ "cuda" is "cuda:0": PyTorch would ask its CUDA runtime for the current device, and it has none."""
    if isinstance(x, str):
        return DEVICE if x == "cuda" else x
    return DEVICE if isinstance(x, torch.device) and x.type == "cuda" and x.index is None else x
