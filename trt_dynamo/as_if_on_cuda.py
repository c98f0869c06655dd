"""A model as if it were on a GPU, on a machine without one. In: a model and arguments on the CPU. Out, for as long as a
block lasts: the same model with fake tensors, which have sizes, strides and a device but no elements; the way back from
each to the tensor with the elements; and graphs that are relocated to a GPU.

Dynamo and AOTAutograd trace fake tensors as they trace real ones. But fake tensors on a GPU that is not there get other
strides from attention than on one that is there (torch asks the GPU which kernel it would take), and torch without CUDA
cannot trace there at all. So the fake tensors lie on `cpu:0`, which to torch is another device than `cpu`, and what
differs on a GPU is made up for.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from trt_dynamo.errors import Unsupported

CUDA = torch.device("cuda", 0)
# A tensor that the model leaves on the CPU stays apart from those that are taken to be on the GPU.
CPU_FOR_CUDA = torch.device("cpu", 0)


def place_for(device: torch.device) -> torch.device:
    """Where twins are to lie so that the graph, after `relocated`, is one on this device."""
    return CPU_FOR_CUDA if device.type == "cuda" else device


@contextlib.contextmanager
def relocated(module: GraphModule, place: torch.device, device: torch.device) -> Iterator[None]:
    """Inside, what the graph has on `place` is on `device`."""
    if place == device:
        yield
        return
    changed: list[FakeTensor] = []
    for node in module.graph.nodes:
        node.args = map_aggregate(node.args, lambda value: device if is_at(value, place) else value)
        node.kwargs = map_aggregate(node.kwargs, lambda value: device if is_at(value, place) else value)
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor) and value.fake_device == place:
                value.fake_device = device
                changed.append(value)
    module.recompile()
    try:
        yield
    finally:  # Dynamo has its own use for them
        for value in changed:
            value.fake_device = place


def is_at(value: Any, place: torch.device) -> bool:
    return isinstance(value, torch.device) and value == place


class Twins:
    """Fake tensors on `device`, each for one real tensor. Tensors that share memory have twins that share it."""

    def __init__(self, device: torch.device = CPU_FOR_CUDA) -> None:
        self.device = device
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.made: dict[int, torch.Tensor] = {}  # by the id of the real tensor,
        self.reals: dict[int, torch.Tensor] = {}  # by the id of the twin,
        self.kept: list[torch.Tensor] = []  # and what has these ids
        self.storages: dict[int, torch.UntypedStorage] = {}

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor for a real one, with the marks that the user put on it for Dynamo.

        Raises:
            Unsupported: a tensor of a kind that cannot be faked so.
        """
        if id(tensor) not in self.made:
            twin = self.make(tensor)
            self.made[id(tensor)], self.reals[id(twin)] = twin, tensor
            self.kept += [tensor, twin]
        return self.made[id(tensor)]

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or tensor.layout != torch.strided:
            raise Unsupported(f"a {type(tensor).__name__} ({tensor.layout}) cannot be taken for one on a GPU")
        if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            raise Unsupported("a quantized, conjugated or negated tensor cannot be taken for one on a GPU")
        storage = tensor.untyped_storage()
        memory = self.storages.setdefault(storage._cdata, torch.UntypedStorage(storage.nbytes(), device="meta"))
        like = torch.empty(0, dtype=tensor.dtype, device="meta")
        like = like.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
        twin: torch.Tensor = FakeTensor(self.mode, like, self.device)
        if isinstance(tensor, nn.Parameter):
            # Nothing is trained here.
            twin = nn.Parameter(twin, requires_grad=False)
        vars(twin).update({name: mark for name, mark in vars(tensor).items() if name.startswith("_dynamo_")})
        return twin

    def real(self, value: Any) -> Any:
        """The tensor behind a twin; anything else as it is."""
        return self.reals.get(id(value), value)

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, their tensors exchanged for twins."""
        given: Any = (tuple(args), dict(kwargs))
        moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, self.twin, given)
        return moved


@contextlib.contextmanager
def moved(model: Callable[..., Any], twins: Twins) -> Iterator[None]:
    """Inside, the parameters and buffers of the model, as far as `Module.to` would move them, are twins."""
    modules = list(dict.fromkeys(each for root in modules_of(model) for each in root.modules()))
    before = [(each, dict(vars(each)), dict(each._parameters), dict(each._buffers)) for each in modules]
    try:
        for module in modules:
            exchange(module, twins)
        with layouts_of_cuda(twins.device), twins.mode:
            yield
    finally:
        for module, attributes, parameters, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


def exchange(module: nn.Module, twins: Twins) -> None:
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                held[name] = twins.twin(tensor)  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):
        # It keeps a list of its weights beside them, and asks by weak references whether they still are the same.
        weights = [getattr(module, name, None) for name in module._flat_weights_names]
        module._flat_weights = weights
        vars(module)["_flat_weight_refs"] = [None if each is None else weakref.ref(each) for each in weights]


def modules_of(model: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a call of the model can reach: itself, that of a bound method, those that a function names."""
    owner = getattr(model, "__self__", model)
    if isinstance(owner, nn.Module):
        return [owner]
    function = inspect.unwrap(model)
    if not inspect.isfunction(function):
        return (
            [each for each in vars(owner).values() if isinstance(each, nn.Module)] if hasattr(owner, "__dict__") else []
        )
    named = inspect.getclosurevars(function)
    return [each for each in (*named.nonlocals.values(), *named.globals.values()) if isinstance(each, nn.Module)]


@contextlib.contextmanager
def layouts_of_cuda(place: torch.device) -> Iterator[None]:
    """Gives the results of convolutions on twins the layouts that cuDNN gives them, and keeps torch from asking which
    of the CPU's convolutions it would take: the answer depends on the batch, and the graph would be one for that.
    """
    if place != CPU_FOR_CUDA:
        yield
        return
    select, determine = torch._C._select_conv_backend, torch._C._conv_determine_backend_memory_format
    backends: Any = vars(torch._C)["_ConvBackend"]

    def backend(*args: Any, **kwargs: Any) -> Any:
        x = kwargs["input"] if "input" in kwargs else args[0]
        if x.device != place:
            return select(*args, **kwargs)
        empty = any(isinstance(size, int) and size == 0 for size in x.shape)
        return backends.Empty if empty else backends.Cudnn

    def layout(x: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
        known = x.device != place or backend == backends.Empty
        return determine(x, weight, backend) if known else layout_of_cudnn(x, weight)

    with (
        mock.patch.object(torch._C, "_select_conv_backend", backend),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", layout),
    ):
        yield


def layout_of_cudnn(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """ATen's `cudnn_conv_suggest_memory_format` (aten/src/ATen/native/ConvUtils.h)."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
    if wanted is None or torch.float64 in (x.dtype, weight.dtype) or not torch.backends.cudnn.enabled:
        return torch.contiguous_format
    return wanted if wanted in (suggest_memory_format(x), suggest_memory_format(weight)) else torch.contiguous_format
