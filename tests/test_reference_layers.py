"""Layers and attributes that the ONNX tests and TensorRT's folding leave open: worked out by hand, or by torch.

Where NVIDIA's operator pages have a worked example, its numbers are the expectation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trt_dynamo.errors import ConversionError, EngineError, Unsupported
from trt_dynamo.log import logger
from trt_dynamo.reference import Evaluator
from trt_dynamo.reference import evaluate as evaluate_on_inputs_device
from trt_dynamo.trt import to_trt, trt

F32 = trt.DataType.FLOAT


def close(have: Tensor, want: Any, tolerance: float = 1e-5) -> None:
    want = want if isinstance(want, Tensor) else torch.tensor(want)
    torch.testing.assert_close(have, want.to(have.dtype), rtol=tolerance, atol=tolerance, equal_nan=True)


def evaluate(
    network: Any,
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, Tensor] | None = None,
    intermediates: bool = False,
) -> dict[str, Tensor]:
    """The network's outputs, from the CPU; where there is a GPU, it must find the same."""
    found = evaluate_on_inputs_device(network, inputs, constants, intermediates)
    if torch.cuda.is_available() and inputs:
        there = {name: value.cuda() for name, value in inputs.items()}
        with torch.backends.cudnn.flags(allow_tf32=False):
            again = evaluate_on_inputs_device(network, there, constants, intermediates)
        for name, value in found.items():
            assert again[name].is_cuda
            if (network.name or "") != RANDOM:
                close(again[name].cpu().double(), value.double(), 1e-4)
    return found


RANDOM = "random"  # the name of a network whose results differ from run to run


class Net:
    """A network with short ways to make inputs and constants; the first output is `y`."""

    def __init__(self) -> None:
        self.builder = trt.Builder(logger())
        self.raw = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.kept: list[Any] = []

    def input(self, name: str, like: Tensor, shape: tuple[int, ...] | None = None) -> Any:
        return self.raw.add_input(name, to_trt(like.dtype), tuple(like.shape) if shape is None else shape)

    def weights(self, value: Tensor) -> Any:
        if value.dtype in (torch.bfloat16, torch.float8_e4m3fn):
            found = trt.Weights(to_trt(value.dtype), value.data_ptr(), value.numel())
            self.kept.append(value)
        else:
            found = numpy.array(value.numpy())
        self.kept.append(found)
        return found

    def constant(self, value: Any) -> Any:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        return self.raw.add_constant(tuple(tensor.shape), self.weights(tensor)).get_output(0)

    def mark(self, *tensors: Any) -> None:
        for index, tensor in enumerate(tensors):
            tensor.name = "y" if index == 0 else f"y{index}"
            self.raw.mark_output(tensor)

    def run(self, constants: Mapping[str, Tensor] | None = None, **inputs: Tensor) -> Tensor:
        return evaluate(self.raw, inputs, constants)["y"]


def single(x: Tensor, add: Any) -> Net:
    """A network of one layer, `add(net, x)`, over the input `x`."""
    net = Net()
    layer = add(net, net.input("x", x))
    net.mark(*[layer.get_output(i) for i in range(layer.num_outputs)])
    return net


# Convolution and pooling


@pytest.mark.parametrize("own_weights", [True, False])
def test_convolution_with_padding_of_its_own_on_each_side(own_weights: bool) -> None:
    x, kernel, bias = torch.randn(2, 4, 6, 7), torch.randn(6, 2, 3, 2), torch.randn(6)

    def add(net: Net, tensor: Any) -> Any:
        if own_weights:
            layer = net.raw.add_convolution_nd(tensor, 6, (3, 2), net.weights(kernel), net.weights(bias))
        else:
            layer = net.raw.add_convolution_nd(tensor, 6, (3, 2), trt.Weights(F32), trt.Weights(F32))
            layer.set_input(1, net.constant(kernel))
            layer.set_input(2, net.constant(bias))
        layer.num_groups, layer.stride_nd, layer.dilation_nd = 2, (2, 1), (1, 3)
        layer.pre_padding, layer.post_padding = (2, 0), (1, 3)
        return layer

    want = functional.conv2d(functional.pad(x, (0, 3, 2, 1)), kernel, bias, (2, 1), 0, (1, 3), 2)
    close(single(x, add).run(x=x), want)


@pytest.mark.parametrize(("mode", "before"), [("SAME_UPPER", 0), ("SAME_LOWER", 1)])
def test_convolution_with_same_padding(mode: str, before: int) -> None:
    x, kernel = torch.randn(1, 1, 6, 6), torch.randn(1, 1, 3, 3)

    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_convolution_nd(tensor, 1, (3, 3), net.weights(kernel))
        layer.stride_nd, layer.padding_mode = (2, 2), getattr(trt.PaddingMode, mode)
        return layer

    padded = functional.pad(x, (before, 1 - before, before, 1 - before))
    close(single(x, add).run(x=x), functional.conv2d(padded, kernel, stride=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_convolution_in_low_precision_sums_in_float32(dtype: torch.dtype) -> None:
    x, kernel = torch.randn(1, 64, 5, 5).to(dtype), torch.randn(8, 64, 3, 3).to(dtype)

    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_convolution_nd(tensor, 8, (3, 3), trt.Weights(to_trt(dtype)))
        layer.set_input(1, net.constant(kernel))
        return layer

    net = single(x, add)
    name = next(net.raw.get_layer(i).name for i in range(net.raw.num_layers) if i == 1)
    have = net.run({name: kernel}, x=x)
    assert torch.equal(have, functional.conv2d(x.float(), kernel.float()).to(dtype))


def test_deconvolution_pads_and_crops_its_output() -> None:
    x, kernel, bias = torch.randn(2, 4, 5, 6), torch.randn(4, 3, 3, 2), torch.randn(6)

    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_deconvolution_nd(tensor, 6, (3, 2), net.weights(kernel), net.weights(bias))
        layer.num_groups, layer.stride_nd = 2, (2, 3)
        layer.pre_padding, layer.post_padding = (1, 0), (0, 1)
        return layer

    whole = functional.conv_transpose2d(x, kernel, bias, (2, 3), groups=2)
    close(single(x, add).run(x=x), whole[:, :, 1:, :-1])


def test_deconvolution_with_output_padding() -> None:
    """torch's output_padding is a smaller padding after the output."""
    x, kernel, bias = torch.randn(1, 2, 4, 4), torch.randn(2, 3, 3, 3), torch.randn(3)

    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_deconvolution_nd(tensor, 3, (3, 3), net.weights(kernel), net.weights(bias))
        layer.stride_nd, layer.pre_padding, layer.post_padding = (2, 2), (1, 1), (0, 0)
        return layer

    close(single(x, add).run(x=x), functional.conv_transpose2d(x, kernel, bias, 2, 1, 1))


def pool(kind: str, **attributes: Any) -> Any:
    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_pooling_nd(tensor, getattr(trt.PoolingType, kind), (3, 3))
        layer.stride_nd = (2, 2)
        for name, value in attributes.items():
            setattr(layer, name, value)
        return layer

    return add


@pytest.mark.parametrize(
    ("excludes", "want"),
    [
        # ones, 4x4, padded by one: the divisor is what the window shares with the input, or with the padded input
        (True, [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        (False, [[4 / 9, 6 / 9, 2 / 6], [6 / 9, 1, 3 / 6], [2 / 6, 3 / 6, 1 / 4]]),
    ],
)
def test_average_pooling_in_ceil_mode(excludes: bool, want: list[list[float]]) -> None:
    x = torch.ones(1, 1, 4, 4)
    add = pool(
        "AVERAGE",
        padding_nd=(1, 1),
        padding_mode=trt.PaddingMode.EXPLICIT_ROUND_UP,
        average_count_excludes_padding=excludes,
    )
    have = single(x, add).run(x=x)
    close(have[0, 0], want)
    theirs = functional.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=not excludes)
    close(have, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_max_pooling_ignores_padding(dtype: torch.dtype) -> None:
    x = (torch.rand(1, 2, 5, 5) - 5).to(dtype)
    have = single(x, pool("MAX", pre_padding=(1, 0), post_padding=(0, 2))).run(x=x)
    padded = functional.pad(x.float(), (0, 2, 1, 0), value=-float("inf"))
    assert torch.equal(have, functional.max_pool2d(padded, 3, 2).to(dtype))


def test_blended_pooling() -> None:
    x = torch.randn(1, 2, 7, 7)
    have = single(x, pool("MAX_AVERAGE_BLEND", blend_factor=0.3)).run(x=x)
    close(have, 0.7 * functional.max_pool2d(x, 3, 2) + 0.3 * functional.avg_pool2d(x, 3, 2))


def test_pooling_keeps_a_window_that_starts_in_the_padding() -> None:
    x = torch.ones(1, 1, 2, 2)

    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_pooling_nd(tensor, trt.PoolingType.MAX, (1, 1))
        layer.stride_nd, layer.post_padding = (2, 2), (1, 1)
        layer.padding_mode = trt.PaddingMode.EXPLICIT_ROUND_UP
        return layer

    assert single(x, add).run(x=x).shape == (1, 1, 2, 2)


def test_padding_adds_zeros_and_cuts() -> None:
    x = torch.randn(1, 2, 3, 4)
    net = single(x, lambda net, tensor: net.raw.add_padding_nd(tensor, (1, -1), (-1, 2)))
    close(net.run(x=x), functional.pad(x, (-1, 2, 1, -1)))


# Normalization, softmax, reductions


def test_local_response_normalization_divides_alpha_by_the_window() -> None:
    x = torch.arange(5.0).reshape(1, 5, 1, 1).expand(1, 5, 2, 2).contiguous()
    have = single(x, lambda net, tensor: net.raw.add_lrn(tensor, 3, 1.0, 1.0, 0.1)).run(x=x)
    close(have[0, :, 0, 0], [0.0, 0.56603765, 0.4195804, 0.3071672, 0.47430828])


@pytest.mark.parametrize("version", ["add_normalization", "add_normalization_v2"])
def test_group_normalization(version: str) -> None:
    x = torch.randn(2, 6, 4, 5)
    count = 3 if version == "add_normalization" else 6
    factor, bias = torch.randn(1, count, 1, 1), torch.randn(1, count, 1, 1)

    def add(net: Net, tensor: Any) -> Any:
        layer = getattr(net.raw, version)(tensor, net.constant(factor), net.constant(bias), 0b1100)
        layer.num_groups, layer.epsilon = 3, 0.1
        return layer

    each = 6 // count
    want = functional.group_norm(x, 3, eps=0.1) * factor.repeat_interleave(each, 1) + bias.repeat_interleave(each, 1)
    close(single(x, add).run(x=x), want)


def test_layer_normalization_in_half_takes_its_statistics_in_float32() -> None:
    x = (torch.randn(3, 512) * 100 + 1000).half()
    ones, zeros = torch.ones(1, 512).half(), torch.zeros(1, 512).half()

    def add(net: Net, tensor: Any) -> Any:
        return net.raw.add_normalization_v2(tensor, net.constant(ones), net.constant(zeros), 0b10)

    close(single(x, add).run(x=x), functional.layer_norm(x.float(), [512]), 2e-3)


def test_ragged_softmax() -> None:
    x, bounds = torch.tensor([[[1.0, 1, 1, 1, 0.5], [3, 4, -20, 10, 5]]]), torch.tensor([[[5], [3]]], dtype=torch.int32)
    net = Net()
    layer = net.raw.add_ragged_softmax(net.input("x", x), net.input("bounds", bounds))
    net.mark(layer.get_output(0))
    have = net.run(x=x, bounds=bounds)[0]
    close(have[0], torch.softmax(x[0, 0], -1))
    close(have[1], torch.cat([torch.softmax(x[0, 1, :3], -1), torch.zeros(2)]))


@pytest.mark.parametrize(("kind", "want"), [("SUM", 0), ("PROD", 1), ("MAX", -float("inf")), ("MIN", float("inf"))])
def test_reduction_over_nothing(kind: str, want: float) -> None:
    x = torch.zeros(2, 0)
    net = single(x, lambda net, tensor: net.raw.add_reduce(tensor, getattr(trt.ReduceOperation, kind), 0b10, False))
    close(net.run(x=x), [want, want])


@pytest.mark.parametrize("kind", ["MAX", "MIN"])
def test_top_k_with_k_given_as_a_tensor(kind: str) -> None:
    x = torch.randn(3, 7)
    net = Net()
    k = torch.tensor(4, dtype=torch.int32)
    layer = net.raw.add_topk(net.input("x", x), getattr(trt.TopKOperation, kind), 1, 0b10)
    layer.set_input(1, net.input("k", k))
    net.mark(layer.get_output(0), layer.get_output(1))
    found = evaluate(net.raw, {"x": x, "k": k})
    values, indices = torch.topk(x, 4, largest=kind == "MAX")
    close(found["y"], values)
    assert torch.equal(found["y1"], indices.int())
    with pytest.raises(EngineError, match="k is 8"):
        evaluate(net.raw, {"x": x, "k": torch.tensor(8, dtype=torch.int32)})


def test_top_k_of_equal_values_takes_the_first() -> None:
    x = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0] * 10).reshape(1, 50)
    net = single(x, lambda net, tensor: net.raw.add_topk(tensor, trt.TopKOperation.MAX, 4, 0b10))
    assert evaluate(net.raw, {"x": x})["y1"].tolist() == [[1, 2, 4, 6]]


# Quantization


def test_quantize_rounds_ties_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 500.0, -500.0, -128.5])
    net = single(x, lambda net, t: net.raw.add_quantize(t, net.constant(1.0), trt.DataType.INT8))
    assert net.run(x=x).tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128]


def test_quantize_per_axis_and_back() -> None:
    x, scale = torch.randn(2, 3, 4) * 10, torch.tensor([0.5, 0.25, 2.0])
    net = Net()
    quantized = net.raw.add_quantize(net.input("x", x), net.constant(scale), trt.DataType.INT8)
    quantized.axis = 1
    back = net.raw.add_dequantize(quantized.get_output(0), net.constant(scale), F32)
    back.axis = 1
    net.mark(back.get_output(0))
    spread = scale.reshape(1, 3, 1)
    close(net.run(x=x), torch.round(x / spread).clamp(-128, 127) * spread)


def test_dequantize_int4_by_blocks() -> None:
    """The weights, which Python cannot read back, are given: INT4 as int8 values."""
    values = torch.randint(-8, 8, (4, 6), dtype=torch.int8)
    packed = ((values.reshape(-1, 2)[:, 0] & 15) | (values.reshape(-1, 2)[:, 1] << 4)).contiguous()
    scale = torch.rand(2, 6) + 0.5
    net = Net()
    net.kept.append(packed)
    weights = net.raw.add_constant((4, 6), trt.Weights(trt.DataType.INT4, packed.data_ptr(), 24))
    weights.name = "weights"
    layer = net.raw.add_dequantize(weights.get_output(0), net.constant(scale), F32)
    layer.axis = 0
    net.mark(layer.get_output(0))
    close(net.run({"weights": values}), values * scale.repeat_interleave(2, 0))
    with pytest.raises(Unsupported, match="INT4 cannot be read back"):
        net.run()


def test_quantize_to_fp8_saturates() -> None:
    x = torch.tensor([0.1, 1.0, 17.0, 19.0, 448.0, 1000.0, -1e6])
    net = Net()
    quantized = net.raw.add_quantize(net.input("x", x), net.constant(1.0), trt.DataType.FP8)
    net.mark(net.raw.add_dequantize(quantized.get_output(0), net.constant(1.0), F32).get_output(0))
    assert net.run(x=x).tolist() == [0.1015625, 1.0, 16.0, 20.0, 448.0, 448.0, -448.0]


def test_fp4_rounds_ties_to_the_even_bit() -> None:
    x = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.3, -2.4, -4.9, -5.1, 1.4, 0.74, 0.2, 6.0]] * 2)
    scale = torch.ones(2, 1)
    net = Net()
    quantized = net.raw.add_quantize(net.input("x", x), net.constant(scale), trt.DataType.FP4)
    quantized.axis = 1
    net.mark(net.raw.add_dequantize(quantized.get_output(0), net.constant(scale), F32).get_output(0))
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.5, -2.0, -4.0, -6.0, 1.5, 0.5, 0.0, 6.0]
    assert net.run(x=x)[0].tolist() == want


def test_dynamic_quantization_to_fp4_and_back_is_close() -> None:
    x, outer = torch.randn(3, 64) * 5, torch.tensor(0.25)
    net = Net()
    layer = net.raw.add_dynamic_quantize(net.input("x", x), 1, 16, trt.DataType.FP4, trt.DataType.FP8)
    layer.set_input(1, net.constant(outer))
    scale = net.raw.add_dequantize(layer.get_output(1), net.constant(outer), F32)
    net.mark(net.raw.add_dequantize(layer.get_output(0), scale.get_output(0), F32).get_output(0), scale.get_output(0))
    found = evaluate(net.raw, {"x": x})
    blocks = x.unflatten(1, (4, 16))
    largest = blocks.abs().amax(-1)
    assert found["y1"].shape == (3, 4)
    torch.testing.assert_close(found["y1"], largest / 6, rtol=1 / 16, atol=0)
    # FP4's widest gap is a sixth of the largest magnitude on either side of a value, and scales round too
    assert bool(((found["y"].unflatten(1, (4, 16)) - blocks).abs() <= largest[..., None] * 0.25).all())


def test_dynamic_quantization_to_mxfp8_has_scales_that_are_powers_of_two() -> None:
    x = torch.randn(2, 64) * 100
    net = single(x, lambda net, t: net.raw.add_dynamic_quantize(t, 1, 32, trt.DataType.FP8, trt.DataType.E8M0))
    found = evaluate(net.raw, {"x": x})
    exponents = torch.log2(found["y1"])
    assert torch.equal(exponents, exponents.round())
    back = found["y"].float().unflatten(1, (2, 32)) * found["y1"][..., None]
    torch.testing.assert_close(back, x.unflatten(1, (2, 32)), rtol=1 / 16, atol=1e-2)


# Indexing


def test_gather_reads_zeros_where_an_index_is_out_of_range() -> None:
    x, index = torch.arange(12.0).reshape(3, 4), torch.tensor([2, 3, -1, -4])
    net = Net()
    net.mark(net.raw.add_gather(net.input("x", x), net.input("i", index), 0).get_output(0))
    close(net.run(x=x, i=index), torch.stack([x[2], torch.zeros(4), x[2], torch.zeros(4)]))


def test_scatter_takes_negative_indices() -> None:
    x, index, updates = torch.zeros(3, 4), torch.tensor([[-1, 0], [1, -2]]), torch.tensor([5.0, 7.0])
    net = Net()
    arguments = (net.input("x", x), net.input("i", index), net.input("u", updates))
    net.mark(net.raw.add_scatter(*arguments, trt.ScatterMode.ND).get_output(0))
    want = x.clone()
    want[2, 0], want[1, 2] = 5, 7
    close(net.run(x=x, i=index, u=updates), want)


def test_integer_division_by_zero_is_no_error() -> None:
    """What it gives is undefined; the elements beside it are not."""
    a, b = torch.tensor([7, -7, 9]), torch.tensor([2, 0, -2])
    net = Net()
    operation = trt.ElementWiseOperation.FLOOR_DIV
    net.mark(net.raw.add_elementwise(net.input("a", a), net.input("b", b), operation).get_output(0))
    have = net.run(a=a, b=b)
    assert (int(have[0]), int(have[2])) == (3, -5)


def test_non_zero() -> None:
    x = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    net = single(x, lambda net, tensor: net.raw.add_non_zero(tensor))
    assert torch.equal(net.run(x=x), torch.tensor([[0, 1], [1, 0]], dtype=torch.int32))
    assert net.run(x=torch.zeros(2, 2)).shape == (2, 0)


BOXES = [[0.5, 0.5, 1.0, 1.0], [0.5, 0.6, 1.0, 1.0], [0.5, 0.4, 1.0, 1.0], [0.5, 10.5, 1.0, 1.0], [0.5, 10.6, 1.0, 1.0]]


def suppression(scores: Tensor, limit: int | None = None) -> tuple[list[list[int]], int]:
    boxes = torch.tensor([BOXES])
    net = Net()
    most = net.constant(torch.tensor(2, dtype=torch.int32))
    layer = net.raw.add_nms(net.input("boxes", boxes), net.input("scores", scores), most)
    layer.bounding_box_format = trt.BoundingBoxFormat.CENTER_SIZES
    layer.set_input(3, net.constant(0.5))
    layer.set_input(4, net.constant(0.1))
    if limit is not None:
        layer.topk_box_limit = limit
    net.mark(layer.get_output(0), layer.get_output(1))
    found = evaluate(net.raw, {"boxes": boxes, "scores": scores})
    return found["y"].tolist(), int(found["y1"])


def test_non_maximum_suppression() -> None:
    """Boxes as center and size; rows by falling score; a class does not suppress another."""
    scores = torch.tensor([[[0.9, 0.05], [0.75, 0.95], [0.6, 0.3], [0.95, 0.2], [0.5, 0.1]]])
    rows = [[0, 0, 3], [0, 1, 1], [0, 0, 0], [0, 1, 3]]
    assert suppression(scores) == (rows, 4)
    # the limit counts the candidates of all classes together
    assert suppression(scores, limit=3) == (rows[:3], 3)


def centered_suppression(boxes: Tensor, scores: Tensor, overlap: float, least: float) -> list[list[int]]:
    net = Net()
    most = net.constant(torch.tensor(9, dtype=torch.int32))
    layer = net.raw.add_nms(net.input("boxes", boxes), net.input("scores", scores), most)
    layer.bounding_box_format = trt.BoundingBoxFormat.CENTER_SIZES
    layer.set_input(3, net.constant(overlap))
    layer.set_input(4, net.constant(least))
    net.mark(layer.get_output(0))
    rows: list[list[int]] = net.run(boxes=boxes, scores=scores).tolist()
    return rows


def test_non_maximum_suppression_at_its_thresholds() -> None:
    """A score must exceed its threshold; an overlap, here of exactly a half, may reach its own."""
    boxes = torch.tensor([[[1.0, 1.0, 2.0, 2.0], [1.0, 1.5, 2.0, 1.0], [1.0, 1.75, 2.0, 0.5], [8.0, 8.0, 1.0, 1.0]]])
    scores = torch.tensor([[[0.75], [0.5], [0.375], [0.25]]])
    assert centered_suppression(boxes, scores, 0.5, 0.25) == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]


def test_boxes_given_by_their_centers() -> None:
    """A small box in a corner of a large one: taken as corners, or from a corner on, they would not meet."""
    boxes = torch.tensor([[[5.0, 5.0, 8.0, 8.0], [2.0, 2.0, 2.0, 2.0]]])
    assert centered_suppression(boxes, torch.tensor([[[0.9], [0.8]]]), 0.0, 0.1) == [[0, 0, 0]]


def test_reverse_sequence() -> None:
    x, lengths = torch.arange(12.0).reshape(4, 3), torch.tensor([4, 2, 1], dtype=torch.int32)
    net = Net()
    layer = net.raw.add_reverse_sequence(net.input("x", x), net.input("n", lengths))
    layer.batch_axis, layer.sequence_axis = 1, 0
    net.mark(layer.get_output(0))
    want = torch.stack([x[[3, 2, 1, 0], 0], x[[1, 0, 2, 3], 1], x[:, 2]], 1)
    close(net.run(x=x, n=lengths), want)


# Resampling


@pytest.mark.parametrize(
    ("mode", "transform", "rounding", "torch_mode", "align"),
    [
        ("NEAREST", "ASYMMETRIC", "FLOOR", "nearest", None),
        ("NEAREST", "HALF_PIXEL", "HALF_UP", "nearest-exact", None),
        ("LINEAR", "HALF_PIXEL", "FLOOR", "bilinear", False),
        ("LINEAR", "ALIGN_CORNERS", "FLOOR", "bilinear", True),
        ("CUBIC", "HALF_PIXEL", "FLOOR", "bicubic", False),
        ("CUBIC", "ALIGN_CORNERS", "FLOOR", "bicubic", True),
    ],
)
@pytest.mark.parametrize("size", [(9, 4), (3, 14), (5, 7), (1, 1)])
def test_resize_as_torch_interpolates(
    mode: str, transform: str, rounding: str, torch_mode: str, align: bool | None, size: tuple[int, int]
) -> None:
    x = torch.randn(2, 3, 5, 7)

    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_resize(tensor)
        layer.shape = (2, 3, *size)
        layer.resize_mode = getattr(trt.InterpolationMode, mode)
        layer.coordinate_transformation = getattr(trt.ResizeCoordinateTransformation, transform)
        layer.nearest_rounding = getattr(trt.ResizeRoundMode, rounding)
        return layer

    close(single(x, add).run(x=x), functional.interpolate(x, size, mode=torch_mode, align_corners=align), 2e-5)


def test_resize_by_scales_uses_the_scales() -> None:
    x = torch.randn(1, 1, 5)

    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_resize(tensor)
        layer.scales = [1.0, 1.0, 1.7]
        layer.resize_mode = trt.InterpolationMode.LINEAR
        layer.coordinate_transformation = trt.ResizeCoordinateTransformation.HALF_PIXEL
        return layer

    want = functional.interpolate(x, scale_factor=1.7, mode="linear", recompute_scale_factor=False)
    close(single(x, add).run(x=x), want)


# Transformer layers


def attention(query: Tensor, key: Tensor, kind: str, lengths: Tensor | None = None, **forms: Any) -> Net:
    net = Net()
    q, k, v = (net.input(n, like) for n, like in (("q", query), ("k", key), ("v", key)))
    causal = getattr(trt.CausalMaskKind, kind)
    layer = net.raw.add_attention_v2(q, k, v, trt.AttentionNormalizationOp.SOFTMAX, causal)
    layer.decomposable = True
    if lengths is not None:
        layer.key_value_lengths = net.input("n", lengths)
    for name, value in forms.items():
        setattr(layer, name, net.input(name, value) if isinstance(value, Tensor) else value)
    net.mark(layer.get_output(0))
    return net


def plain_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    repeat = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
    return torch.softmax((query @ key.mT).masked_fill(hidden, -float("inf")), -1) @ value


@pytest.mark.parametrize(("kind", "diagonal"), [("UPPER_LEFT", 1), ("LOWER_RIGHT", 5), ("NONE", 99)])
def test_causal_attention_with_fewer_queries_than_keys(kind: str, diagonal: int) -> None:
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    have = attention(query, key, kind).run(q=query, k=key, v=value)
    close(have, plain_attention(query, key, value, torch.ones(3, 7).bool().triu(diagonal)))


def test_attention_over_keys_of_many_lengths() -> None:
    query, key, value = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    lengths = torch.tensor([5, 2], dtype=torch.int32)
    have = attention(query, key, "NONE", lengths).run(q=query, k=key, v=value, n=lengths)
    for item, length in enumerate([5, 2]):
        hidden = (torch.arange(7) >= length).expand(3, 7)
        close(have[item], plain_attention(query[item], key[item], value[item], hidden))
    with pytest.raises(Unsupported, match="LOWER_RIGHT"):
        attention(query, key, "LOWER_RIGHT", lengths).run(q=query, k=key, v=value, n=lengths)


@pytest.mark.parametrize(("kind", "shift"), [("UPPER_LEFT", False), ("LOWER_RIGHT", True)])
def test_attention_over_packed_sequences(kind: str, shift: bool) -> None:
    query, key, value = torch.randn(5, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    queries, keys = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = trt.AttentionIOForm.PACKED_NHD
    net = attention(
        query, key, kind, query_form=packed, key_value_form=packed, query_lengths=queries, key_value_lengths=keys
    )
    have = net.run(q=query, k=key, v=value, query_lengths=queries, key_value_lengths=keys)
    for q, k in (((0, 2), (0, 4)), ((2, 5), (4, 9))):
        parts = tuple(t[slice(*span)].transpose(0, 1) for t, span in ((query, q), (key, k), (value, k)))
        hidden = torch.ones(q[1] - q[0], k[1] - k[0]).bool()
        hidden = hidden.triu(1 + (k[1] - k[0] - q[1] + q[0] if shift else 0))
        close(have[slice(*q)], plain_attention(parts[0], parts[1], parts[2], hidden).transpose(0, 1))


def test_rotary_embedding_by_positions() -> None:
    x, cos, sin = torch.randn(2, 3, 4, 8), torch.randn(10, 2), torch.randn(10, 2)
    positions = torch.randint(0, 10, (2, 4))
    net = Net()
    layer = net.raw.add_rotary_embedding(net.input("x", x), net.constant(cos), net.constant(sin), False, 4)
    layer.set_input(3, net.input("p", positions))
    net.mark(layer.get_output(0))
    c, s = cos[positions][:, None], sin[positions][:, None]
    first, second, rest = x[..., :2], x[..., 2:4], x[..., 4:]
    close(net.run(x=x, p=positions), torch.cat([first * c - second * s, first * s + second * c, rest], -1))


def test_cache_update_writes_each_sequence_at_its_own_place() -> None:
    cache, update, starts = torch.zeros(2, 1, 6, 3), torch.randn(2, 1, 2, 3), torch.tensor([1, 4], dtype=torch.int32)
    net = Net()
    arguments = (net.input("c", cache), net.input("u", update), net.input("i", starts))
    net.mark(net.raw.add_kv_cache_update(*arguments, trt.KVCacheMode.LINEAR).get_output(0))
    want = cache.clone()
    want[0, :, 1:3], want[1, :, 4:6] = update[0], update[1]
    close(net.run(c=cache, u=update, i=starts), want)
    assert bool((cache == 0).all())
    with pytest.raises(EngineError, match="a cache of 6"):
        net.run(c=cache, u=update, i=starts + 1)


@pytest.mark.parametrize("biases", [False, True])
def test_mixture_of_experts(biases: bool) -> None:
    x, scores = torch.randn(2, 3, 8), torch.rand(2, 3, 2)
    chosen = torch.randint(0, 4, (2, 3, 2), dtype=torch.int32)
    gate, up, down = torch.randn(4, 8, 16), torch.randn(4, 8, 16), torch.randn(4, 16, 8)
    shifts = (torch.randn(4, 16), torch.randn(4, 16), torch.randn(4, 8))
    net = Net()
    layer = net.raw.add_moe(net.input("x", x), net.input("e", chosen), net.input("s", scores))
    layer.set_gated_weights(net.constant(gate), net.constant(up), net.constant(down), trt.MoEActType.SILU)
    if biases:
        layer.set_gated_biases(*[net.constant(shift) for shift in shifts])
    net.mark(layer.get_output(0))
    want = torch.zeros_like(x)
    for b, s, k in numpy.ndindex(2, 3, 2):
        expert = int(chosen[b, s, k])
        g, u, d = (shift[expert] if biases else 0 for shift in shifts)
        hidden = functional.silu(x[b, s] @ gate[expert] + g) * (x[b, s] @ up[expert] + u)
        want[b, s] += scores[b, s, k] * (hidden @ down[expert] + d)
    close(net.run(x=x, e=chosen, s=scores), want, 1e-4)


# Loops, conditionals, assertions


def test_loop_ends_when_its_condition_turns_false() -> None:
    """x doubles while it is below 100, but at most 20 times."""
    x = torch.tensor(3.0)
    net = Net()
    loop = net.raw.add_loop()
    state = loop.add_recurrence(net.input("x", x))
    value = state.get_output(0)
    below = net.raw.add_elementwise(value, net.constant(100.0), trt.ElementWiseOperation.LESS).get_output(0)
    limit = net.constant(torch.tensor(20, dtype=torch.int32))
    loop.add_trip_limit(limit, trt.TripLimit.COUNT)
    loop.add_trip_limit(below, trt.TripLimit.WHILE)
    doubled = net.raw.add_elementwise(value, value, trt.ElementWiseOperation.SUM).get_output(0)
    state.set_input(1, doubled)
    every = loop.add_loop_output(doubled, trt.LoopOutput.CONCATENATE, 0)
    every.set_input(1, limit)
    net.mark(loop.add_loop_output(value, trt.LoopOutput.LAST_VALUE).get_output(0), every.get_output(0))
    found = evaluate(net.raw, {"x": x})
    assert float(found["y"]) == 192
    assert found["y1"][:6].tolist() == [6, 12, 24, 48, 96, 192]
    # not one iteration: the last value is the first
    assert float(evaluate(net.raw, {"x": torch.tensor(500.0)})["y"]) == 500


def test_loop_in_reverse_and_loop_in_a_loop() -> None:
    """The outer loop takes the rows from the last to the first; the inner one sums up each row's products with it."""
    x = torch.randn(3, 4)
    net = Net()
    tensor, rows, columns = net.input("x", x), *(net.constant(torch.tensor(n, dtype=torch.int32)) for n in (3, 4))
    outer = net.raw.add_loop()
    outer.add_trip_limit(rows, trt.TripLimit.COUNT)
    row = outer.add_iterator(tensor, 0, True).get_output(0)
    inner = net.raw.add_loop()
    inner.add_trip_limit(columns, trt.TripLimit.COUNT)
    element = inner.add_iterator(row, 0, False).get_output(0)
    total = inner.add_recurrence(net.constant(0.0))
    square = net.raw.add_elementwise(element, element, trt.ElementWiseOperation.PROD).get_output(0)
    added = net.raw.add_elementwise(total.get_output(0), square, trt.ElementWiseOperation.SUM).get_output(0)
    total.set_input(1, added)
    squares = inner.add_loop_output(total.get_output(0), trt.LoopOutput.LAST_VALUE).get_output(0)
    forward = outer.add_loop_output(squares, trt.LoopOutput.CONCATENATE, 0)
    backward = outer.add_loop_output(squares, trt.LoopOutput.REVERSE, 0)
    for layer in (forward, backward):
        layer.set_input(1, rows)
    net.mark(forward.get_output(0), backward.get_output(0))
    found = evaluate(net.raw, {"x": x})
    close(found["y"], (x * x).sum(1).flip(0))
    close(found["y1"], (x * x).sum(1))


def conditional(net: Net, condition: Any, value: Any, taken: Any, other: Any) -> Any:
    """if condition: taken(value) else: other(value)"""
    layer = net.raw.add_if_conditional()
    layer.set_condition(condition)
    inside = layer.add_input(value).get_output(0)
    return layer.add_output(taken(inside), other(inside)).get_output(0)


def negated(net: Net) -> Any:
    return lambda tensor: net.raw.add_unary(tensor, trt.UnaryOperation.NEG).get_output(0)


def test_conditional_evaluates_only_the_branch_taken() -> None:
    x = torch.tensor([2.0, -3.0])

    def picky(tensor: Any) -> Any:
        """Fails if it runs: an index far outside, which STRICT_BOUNDS refuses."""
        start = net.raw.add_elementwise(number, number, trt.ElementWiseOperation.PROD).get_output(0)
        layer = net.raw.add_slice(tensor, (0,), (2,), (1,))
        layer.set_input(1, start)
        return layer.get_output(0)

    net = Net()
    number = net.input("n", torch.tensor([9]))
    flag = net.input("c", torch.tensor(True))
    net.mark(conditional(net, flag, net.input("x", x), negated(net), picky))
    inputs = {"x": x, "n": torch.tensor([9])}
    close(evaluate(net.raw, {"c": torch.tensor(True), **inputs})["y"], -x)
    with pytest.raises(EngineError, match="outside of the bounds"):
        evaluate(net.raw, {"c": torch.tensor(False), **inputs})


def test_conditional_inside_a_loop() -> None:
    """Each row is negated or kept, as its flag says."""
    x, flags = torch.randn(4, 3), torch.tensor([True, False, False, True])
    net = Net()
    loop = net.raw.add_loop()
    count = net.constant(torch.tensor(4, dtype=torch.int32))
    loop.add_trip_limit(count, trt.TripLimit.COUNT)
    row = loop.add_iterator(net.input("x", x)).get_output(0)
    flag = loop.add_iterator(net.input("f", flags)).get_output(0)
    keep = lambda tensor: net.raw.add_identity(tensor).get_output(0)  # noqa: E731
    result = conditional(net, flag, row, negated(net), keep)
    output = loop.add_loop_output(result, trt.LoopOutput.CONCATENATE, 0)
    output.set_input(1, count)
    net.mark(output.get_output(0))
    close(net.run(x=x, f=flags), torch.where(flags[:, None], -x, x))


def test_conditional_in_a_loop_whose_branches_do_not_change() -> None:
    """Only the condition differs from iteration to iteration, and it makes the result differ."""
    x, flags = torch.randn(3), torch.tensor([True, False, True])
    net = Net()
    loop = net.raw.add_loop()
    count = net.constant(torch.tensor(3, dtype=torch.int32))
    loop.add_trip_limit(count, trt.TripLimit.COUNT)
    flag = loop.add_iterator(net.input("f", flags)).get_output(0)
    keep = lambda tensor: net.raw.add_identity(tensor).get_output(0)  # noqa: E731
    result = conditional(net, flag, net.input("x", x), negated(net), keep)
    output = loop.add_loop_output(result, trt.LoopOutput.CONCATENATE, 0)
    output.set_input(1, count)
    net.mark(output.get_output(0))
    close(net.run(x=x, f=flags), torch.stack([-x, x, -x]))


def test_failed_assertion() -> None:
    x = torch.randn(4)
    net = Net()
    tensor = net.input("x", x, (-1,))
    size = net.raw.add_shape(tensor).get_output(0)
    four = net.raw.add_elementwise(size, net.constant([4]), trt.ElementWiseOperation.EQUAL).get_output(0)
    net.raw.add_assertion(four, "four, please")
    net.mark(net.raw.add_identity(tensor).get_output(0))
    close(net.run(x=x), x)
    with pytest.raises(EngineError, match="four, please"):
        net.run(x=torch.randn(5))


def test_random_fill_stays_in_its_range() -> None:
    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_fill((50, 40), trt.FillOperation.RANDOM_UNIFORM, F32)
        layer.alpha, layer.beta = -2.0, 3.0
        net.kept.append(tensor)
        return layer

    net = single(torch.zeros(1), add)
    net.raw.name = RANDOM
    have = net.run(x=torch.zeros(1))
    assert -2 <= float(have.min()) < -1.9
    assert 2.9 < float(have.max()) <= 3
    assert not torch.equal(have, net.run(x=torch.zeros(1)))


def test_normal_fill_has_its_mean_and_deviation() -> None:
    def add(net: Net, tensor: Any) -> Any:
        layer = net.raw.add_fill((100, 100), trt.FillOperation.RANDOM_NORMAL, F32)
        layer.alpha, layer.beta = 5.0, 2.0
        net.kept.append(tensor)
        return layer

    net = single(torch.zeros(1), add)
    net.raw.name = RANDOM
    have = net.run(x=torch.zeros(1))
    assert abs(float(have.mean()) - 5) < 0.2
    assert abs(float(have.std()) - 2) < 0.2


# The evaluator itself


def test_every_layer_type_is_evaluated_or_refused_with_a_reason() -> None:
    from trt_dynamo.reference.layer import CLASSES, RULES

    structural = {"CONSTANT", "TRIP_LIMIT", "RECURRENCE", "ITERATOR", "LOOP_OUTPUT", "CONDITION", "CONDITIONAL_OUTPUT"}
    refused = {"PLUGIN", "PLUGIN_V2", "PLUGIN_V3", "DIST_COLLECTIVE"}
    assert RULES.keys() | structural | refused == set(trt.LayerType.__members__)
    assert CLASSES.keys() >= RULES.keys() | structural
    assert all(hasattr(trt, name) for name in CLASSES.values())


def test_a_layer_without_a_meaning_here_is_refused_by_name() -> None:
    x = torch.randn(4)
    net = Net()
    layer = net.raw.add_dist_collective(
        net.input("x", x), trt.CollectiveOperation.ALL_REDUCE, trt.ReduceOperation.SUM, -1, None
    )
    layer.name = "everyone"
    net.mark(layer.get_output(0))
    with pytest.raises(Unsupported, match=r"'everyone'.*DIST_COLLECTIVE"):
        net.run(x=x)


def test_constants_that_cannot_be_read_back() -> None:
    weights = torch.randn(3).bfloat16()
    net = Net()
    layer = net.raw.add_constant((3,), net.weights(weights))
    layer.name = "weights"
    net.mark(layer.get_output(0))
    with pytest.raises(Unsupported, match=r"'weights' \(CONSTANT\).*BF16 cannot be read back"):
        net.run()
    assert torch.equal(net.run({"weights": weights}), weights)
    assert torch.equal(net.run({"y": weights}), weights)
    with pytest.raises(ConversionError, match="the network has BF16, 3"):
        net.run({"weights": weights.half()})
    with pytest.raises(ConversionError, match="4 elements"):
        net.run({"weights": torch.zeros(4).bfloat16()})


def test_the_network_is_judged_by_its_own_weights_where_they_can_be_read() -> None:
    net = Net()
    layer = net.raw.add_constant((2,), net.weights(torch.tensor([1.0, 2.0])))
    net.mark(layer.get_output(0))
    close(net.run({"y": torch.tensor([8.0, 9.0]), layer.name: torch.tensor([8.0, 9.0])}), [1.0, 2.0])


def test_the_evaluator_bakes_the_weights() -> None:
    weights, low = torch.ones(2), torch.ones(2).bfloat16()
    net = Net()
    array = net.weights(weights)
    first = net.raw.add_constant((2,), array).get_output(0)
    second = net.raw.add_constant((2,), net.weights(low)).get_output(0)
    second.name = "low"
    net.mark(first, net.raw.add_cast(second, F32).get_output(0))
    evaluator = Evaluator(net.raw, {"low": low})
    array[:] = 5
    low.fill_(5)
    for _ in range(2):
        found = evaluator({})
        close(found["y"], [1.0, 1.0])
        close(found["y1"], [1.0, 1.0])
        found["y"].fill_(7)  # a caller's change of a result does not reach the weights


def test_inputs_are_compared_with_the_network() -> None:
    net = Net()
    a, b = net.input("a", torch.zeros(2), (-1,)), net.input("b", torch.zeros(2), (-1,))
    a.set_dimension_name(0, "n")
    b.set_dimension_name(0, "n")
    net.mark(net.raw.add_elementwise(a, b, trt.ElementWiseOperation.SUM).get_output(0))
    two = torch.zeros(2)
    with pytest.raises(EngineError, match="the network's inputs are"):
        net.run(a=two)
    with pytest.raises(EngineError, match="the network's inputs are"):
        net.run(a=two, b=two, c=two)
    with pytest.raises(EngineError, match=r"'a' is torch.float64"):
        net.run(a=two.double(), b=two)
    with pytest.raises(EngineError, match=r"has the shape \(2, 1\)"):
        net.run(a=two[:, None], b=two)
    with pytest.raises(EngineError, match="the dim 'n' is 1, and 2 elsewhere"):
        net.run(a=two, b=two[:1])


def test_intermediates() -> None:
    x = torch.randn(3)
    net = Net()
    hidden = net.raw.add_unary(net.input("x", x), trt.UnaryOperation.EXP).get_output(0)
    hidden.name = "hidden"
    net.mark(net.raw.add_unary(hidden, trt.UnaryOperation.NEG).get_output(0))
    found = evaluate(net.raw, {"x": x}, intermediates=True)
    assert found.keys() == {"x", "hidden", "y"}
    close(found["hidden"], torch.exp(x))
    assert evaluate(net.raw, {"x": x}).keys() == {"y"}


def test_what_is_no_longer_needed_is_let_go() -> None:
    x = torch.randn(3)
    net = Net()
    tensor = net.input("x", x)
    for name in ("a", "b", "c"):
        tensor = net.raw.add_unary(tensor, trt.UnaryOperation.NEG).get_output(0)
        tensor.name = name
    net.mark(net.raw.add_elementwise(tensor, net.raw.get_input(0), trt.ElementWiseOperation.SUM).get_output(0))
    evaluator = Evaluator(net.raw)
    alive: list[set[str]] = []
    evaluator.plan[-1] = Watched(evaluator.plan[-1], alive)
    close(evaluator({"x": x})["y"], torch.zeros(3))
    assert alive == [{"x", "c"}]


class Watched:
    """A step that notes which tensors there are when it runs."""

    def __init__(self, step: Any, alive: list[set[str]]) -> None:
        self.step, self.alive = step, alive

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def execute(self, frame: Any) -> None:
        self.alive.append(set(frame))
        self.step.execute(frame)


def test_a_wrong_meaning_of_a_layer_shows_as_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's own shape inference checks the evaluator, as the evaluator checks values."""
    from trt_dynamo.reference import reduction

    monkeypatch.setitem(reduction.REDUCTIONS, "SUM", lambda x, axes, keep: x)
    x = torch.randn(3, 4)
    net = single(x, lambda net, tensor: net.raw.add_reduce(tensor, trt.ReduceOperation.SUM, 0b10, False))
    with pytest.raises(ConversionError, match=r"gives the shape \(3, 4\); TensorRT infers \(3,\)"):
        net.run(x=x)


def test_a_network_is_left_as_it_was() -> None:
    """The evaluator gives layers the classes of their types for as long as it reads them: `type` means what it did."""
    x = torch.randn(2, 3)
    net = single(x, lambda net, tensor: net.raw.add_activation(tensor, trt.ActivationType.RELU))
    held = net.raw.get_layer(0)
    evaluator = Evaluator(net.raw)
    assert held.type == net.raw.get_layer(0).type == trt.LayerType.ACTIVATION
    close(evaluator({"x": x})["y"], torch.relu(x))
    assert net.raw.get_layer(0).type == trt.LayerType.ACTIVATION
