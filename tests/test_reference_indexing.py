"""Layers that look up, resample and write, and those of transformers: worked out by hand, or by torch."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.reference_networks import Net, close, evaluate, single
from trt_dynamo.errors import EngineError, Unsupported
from trt_dynamo.trt import trt

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
