"""A second device on a machine without one: mixed-device mistakes, which only a GPU would show, fail here.

    with two_devices.here():
        backbone.model.to(two_devices.DEVICE)
        found = backbone.encode(...)             # on the second device
        with pytest.raises(two_devices.Mixed):
            found[0] + torch.zeros(len(found[0]), 1)
    two_devices.numbers(found[0])                # the numbers, on the CPU

A tensor "there" is a `There`: it says that it lies on DEVICE and that `is_cuda`, and holds its numbers in a tensor of the CPU. Every
operation of PyTorch, also those of the backward pass, goes through `_run`: that refuses what CUDA refuses, computes on the CPU, and gives
back a tensor there. DEVICE is `meta`: of all devices but the CPU the only one that every build of torch knows, autograd included.

What is accepted, as of CUDA:
    copies             `to`, `copy_`, `x[...] = y`
    a number           a tensor of the CPU without dimensions in an elementwise operation; and as a value to fill with
    places             an index of the CPU into a tensor there; not the other way round
All else with tensors of both is refused (Mixed), also numpy of a tensor there, and random numbers there from a generator of the CPU.

What it cannot tell: the numerics and the kernels of a GPU, and what differs between streams. Autocast is left out there: arithmetic is that
of the tensors' own types. Models are made before `here`, as `meta` means to transformers that the weights come later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CPU = torch.device("cpu")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
FILLING = {aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}


class Mixed(RuntimeError):
    """Tensors of both devices where CUDA takes those of one."""


class There(Tensor):
    """A tensor on DEVICE; `held` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    @property
    def is_cuda(self) -> bool:  # what the code asks before it takes a GPU's path
        return True

    def __repr__(self) -> str:
        return f"There({self.held})"

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise Mixed("numpy of a tensor that is not on the CPU")
        return self.cpu().numpy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


def numbers(tensor: Tensor) -> Tensor:
    """The numbers of a tensor there, on the CPU; fails for one that is on the CPU."""
    assert isinstance(tensor.detach(), There), "this tensor was to be on the second device"
    return tensor.detach().held


@contextlib.contextmanager
def here() -> Iterator[None]:
    """Within the block there is a second device, DEVICE."""
    with mock.patch.object(torch, "autocast", _Autocast), _Operations(), _Calls():
        yield


def _held(value: Any) -> Any:
    return value.held if isinstance(value, There) else value


def _check(func: Any, args: Sequence[Any], there: list[There], others: list[Tensor]) -> None:
    """Raises Mixed. `others`: the tensors of the CPU among the arguments."""
    if func in INDEXING:
        target, indices, *values = args
        mixed = not isinstance(target, There) and any(isinstance(each, There) for each in indices)
        mixed |= any(isinstance(v, Tensor) and v.dim() > 0 and isinstance(v, There) != isinstance(target, There) for v in values)
    else:
        allowed = torch.Tag.pointwise in func.tags or func in FILLING
        written = func._schema.is_mutable and any(args[0] is each for each in others)  # the result would have to go to the CPU
        mixed = any(not allowed or written or other.dim() > 0 for other in others)
    if mixed:
        shapes = f"{[tuple(each.shape) for each in there]} there and {[tuple(each.shape) for each in others]} on the CPU"
        raise Mixed(f"{func}: tensors of two devices, {shapes}")


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = [each for each in tensors if isinstance(each, There)]
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else DEVICE if there else CPU
    if device == DEVICE and getattr(kwargs.get("generator"), "device", DEVICE) != DEVICE:
        raise Mixed(f"{func}: a generator of the CPU for numbers that are not")
    if not there and device == CPU:
        return func(*args, **kwargs)
    copies = func in (aten.copy_.default, aten._to_copy.default)
    others = [each for each in tensors if not isinstance(each, There)]
    if there and others and not copies:
        _check(func, args, there, others)
    inside = {name: CPU if name == "device" and value is not None else _held(value) for name, value in tree_map(_held, kwargs).items()}
    found = func(*tree_map(_held, args), **inside)
    if func is aten._local_scalar_dense.default or device == CPU:
        return found
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.is_mutable and func.__name__.split(".")[0].endswith("_"):
        if isinstance(args[0], There) and args[0].shape != args[0].held.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor in place")
        return args[0]  # also of copy_ to the CPU
    return tree_map(lambda each: There(each) if isinstance(each, Tensor) else each, found)


class _Operations(TorchDispatchMode):
    """Operations without a tensor there in them: those that make one, and those on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _places(index: Any) -> Any:
    """Lists in an index as tensors: torch would make them on DEVICE, where they would have no numbers."""
    if isinstance(index, tuple):
        return tuple(_places(each) for each in index)
    return torch.tensor(index) if isinstance(index, list) else index


class _Calls(TorchFunctionMode):
    """Calls that look into a tensor before any operation is asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _places(args[1]), *args[2:])
        elif func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
            return There(torch.tensor(*args, **{**kwargs, "device": CPU}))
        elif func is torch.equal:
            if isinstance(args[0], There) != isinstance(args[1], There):
                raise Mixed("torch.equal: tensors of two devices")
            args = tuple(_held(each) for each in args)
        return func(*args, **kwargs)


class _Autocast(torch.autocast):  # type: ignore[misc]
    """torch.autocast, which refuses DEVICE; there it does nothing."""

    def __new__(cls, device_type: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device_type == DEVICE.type else torch.amp.autocast_mode.autocast(device_type, *args, **kwargs)
