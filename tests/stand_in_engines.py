"""What the tests of the stand-in engine share: engines of a few layers, and short ways to bind and run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trt_dynamo.log import logger
from trt_dynamo.reference import ReferenceContext, ReferenceEngine
from trt_dynamo.trt import trt

CPU = torch.device("cpu")
USER_MANAGED = trt.ExecutionContextAllocationStrategy.USER_MANAGED


class Net:
    """A network under construction."""

    def __init__(self) -> None:
        self.builder = trt.Builder(logger())
        self.raw = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def input(self, name: str, shape: Sequence[int], dtype: Any = trt.DataType.FLOAT) -> Any:
        return self.raw.add_input(name, dtype, tuple(shape))

    def mark(self, tensor: Any, name: str = "y") -> None:
        tensor.name = name
        self.raw.mark_output(tensor)


def doubling(shape: Sequence[int] = (-1, 4), profiles: Any = None, device: torch.device = CPU) -> ReferenceEngine:
    """y = x + x"""
    net = Net()
    x = net.input("x", shape)
    net.mark(net.raw.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    ranges = {"x": ((1, 4), (2, 4), (8, 4))} if -1 in shape else {}
    return ReferenceEngine(net.raw, profiles or [ranges], device=device)


def reshaping(device: torch.device = CPU) -> ReferenceEngine:
    """y = x reshaped to the values of the host tensor d; n = the number of rows, on the host too"""
    net = Net()
    x, d = net.input("x", (-1, 6)), net.input("d", (2,), trt.DataType.INT64)
    layer = net.raw.add_shuffle(x)
    layer.set_input(1, d)
    net.mark(layer.get_output(0))
    size = net.raw.add_shape(x).get_output(0)
    size.name = "n"
    net.raw.mark_output_for_shapes(size)
    profile = {"x": ((1, 6), (2, 6), (4, 6)), "d": ((1, 1), (3, 4), (24, 24))}
    return ReferenceEngine(net.raw, [profile], device=device)


def finding(device: torch.device = CPU) -> ReferenceEngine:
    """y = the places where x is not zero: as many as there are"""
    net = Net()
    net.mark(net.raw.add_non_zero(net.input("x", (-1,))).get_output(0))
    return ReferenceEngine(net.raw, [{"x": ((0,), (4,), (9,))}], device=device)


def caching(device: torch.device = CPU) -> ReferenceEngine:
    """y = the cache with u written at i, in the cache's own memory"""
    net = Net()
    cache, update = net.input("cache", (1, 1, 6, 3)), net.input("u", (1, 1, 2, 3))
    index = net.input("i", (1,), trt.DataType.INT32)
    net.mark(net.raw.add_kv_cache_update(cache, update, index, trt.KVCacheMode.LINEAR).get_output(0))
    return ReferenceEngine(net.raw, device=device)


def bind(context: ReferenceContext, **tensors: Tensor) -> None:
    """Binds tensors, which live on as long as the context: an address does not keep its memory."""
    context.__dict__.setdefault("bound_by_the_test", []).extend(tensors.values())
    for name, tensor in tensors.items():
        assert context.set_tensor_address(name, tensor.data_ptr())


def stream_of(device: torch.device) -> int:
    """A stream to run on; on a GPU one that is not the default."""
    return torch.cuda.Stream(device).cuda_stream if device.type == "cuda" else 0


def run(context: ReferenceContext, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert context.execute_async_v3(stream_of(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
