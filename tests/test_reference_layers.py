"""Layers and attributes that the ONNX tests and TensorRT's folding leave open: worked out by hand, or by torch.

Where NVIDIA's operator pages have a worked example, its numbers are the expectation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.reference_networks import F32, Net, close, evaluate, single
from trt_dynamo.errors import EngineError, Unsupported
from trt_dynamo.trt import to_trt, trt

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
