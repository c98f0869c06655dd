"""Operators, some of each family of converters: a function of tensors, and what the tensors are.

A tensor is a tuple of sizes (normal numbers), or a function that makes it. Inputs stay away from where the last bit
decides (ties of a sort, steps of `floor`), so that an engine that rounds otherwise is not blamed for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trt_dynamo.operators.fake_quantize import fake_quantize
from trt_dynamo.selftest.trial import CASES, Case, Trial

Make = Callable[[], Tensor]
Spec = tuple[Any, ...]  # the function, then its tensors

HALF_TYPES = (torch.float16, torch.bfloat16)


def positive(*sizes: int) -> Make:
    return lambda: torch.rand(sizes) + 0.5


def integers(low: int, high: int, *sizes: int, dtype: torch.dtype = torch.int64) -> Make:
    return lambda: torch.randint(low, high, sizes, dtype=dtype)


def bools(*sizes: int) -> Make:
    return integers(0, 2, *sizes, dtype=torch.bool)


def distinct(*sizes: int) -> Make:
    """Numbers of which no two are near each other."""
    count = torch.Size(sizes).numel()
    return lambda: (torch.randperm(count).float() - count / 2).reshape(sizes) * 0.37 + 0.1


def special() -> Tensor:
    """Where floats are not numbers."""
    return torch.tensor([0.0, -0.0, 1.5, -2.5, torch.inf, -torch.inf, torch.nan, 1e-30])


OPERATORS: dict[str, dict[str, Spec]] = {
    "activations": {
        "relu": (torch.relu, (4, 33)),
        "gelu": (lambda x: (F.gelu(x), F.gelu(x, approximate="tanh")), (4, 33)),
        "silu": (lambda x: (F.silu(x), F.hardswish(x), F.mish(x)), (4, 33)),
        "elu": (lambda x: (F.elu(x), F.leaky_relu(x, 0.2), F.selu(x), F.softplus(x)), (4, 33)),
        "prelu": (F.prelu, (2, 5, 7), positive(5)),
        "sigmoid": (lambda x: (x.sigmoid(), x.tanh(), F.logsigmoid(x), F.hardtanh(x)), (4, 33)),
    },
    "pointwise": {
        "arithmetic": (lambda x, y: (x + 2 * y, x - y, x * y, x / y), (4, 33), positive(33)),
        "mixed_dtypes": (lambda x, n: (x * n, n + 1, n * 2.5), (3, 5), integers(-9, 9, 3, 5)),
        "exponentials": (lambda x: (x.exp(), x.log(), x.sqrt(), x.rsqrt(), x.expm1(), x.log1p()), positive(65)),
        "trigonometry": (lambda x: (x.sin(), x.cos(), x.tan(), x.atan(), torch.atan2(x, x + 2)), positive(65)),
        "powers": (lambda x: (x**2, x**0.5, 2**x, torch.pow(x, x)), positive(65)),
        "rounding": (lambda x: (x.floor(), x.ceil(), x.round(), x.trunc(), x.frac()), distinct(64)),
        "clamp": (lambda x: (x.clamp(-1, 1), x.clamp(min=0.2), x.abs(), x.neg(), x.sign()), (65,)),
        "where": (lambda x, y: torch.where(x > y, x, y * 2), (4, 33), (33,)),
        "errors": (lambda x: (x.erf(), torch.lgamma(x), torch.digamma(x)), positive(65)),
    },
    "comparison": {
        "ordering": (lambda x, y: (x > y, x <= y, x == y, x != y), integers(-3, 3, 64), integers(-3, 3, 64)),
        "not_numbers": (lambda x: (x.isnan(), x.isinf(), torch.maximum(x, x.flip(0)), x.nan_to_num(3.0)), special),
        "logic": (lambda a, b: (a & b, a | b, a ^ b, ~a), bools(64), bools(64)),
    },
    "division": {
        "of_integers": (
            lambda a, b: (a // b, a % b, torch.fmod(a, b), a / b), integers(-50, 50, 64), integers(1, 9, 64),
        ),
        "of_floats": (lambda a, b: (torch.remainder(a, b), torch.fmod(a, b)), distinct(64), positive(64)),
    },
    "reduction": {
        "sums": (lambda x: (x.sum(), x.sum(1), x.mean((0, 2), keepdim=True), x.prod(-1)), positive(3, 4, 5)),
        "extremes": (lambda x: (x.amax(1), x.amin(), x.max(dim=2), x.argmin(0)), distinct(3, 4, 5)),
        "variance": (lambda x: (x.var(1), x.std((0, 2)), torch.var_mean(x, -1), x.norm(dim=1)), (3, 4, 5)),
        "logic": (lambda a: (a.any(1), a.all(), a.sum(0)), bools(6, 7)),
    },
    "matmul": {
        "matrix": (torch.mm, (31, 65), (65, 17)),
        "batches": (lambda a, b: (torch.bmm(a, b), a @ b[0], a[0] @ b), (3, 7, 9), (3, 9, 5)),
        "linear": (F.linear, (2, 9, 64), (33, 64), (33,)),
        "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), (2, 5, 8), (2, 6, 8)),
        "integers": (lambda a, b: a.float() @ b.float(), integers(-9, 9, 5, 6), integers(-9, 9, 6, 7)),
    },
    "grouped_products": {
        "experts": (
            lambda x, w, ends: F.grouped_mm(x.bfloat16() / 4, w.bfloat16().mT, offs=ends) * 2,
            (40, 32), (6, 24, 32), lambda: torch.tensor([3, 3, 17, 18, 18, 40], dtype=torch.int32),
        ),
    },
    "convolution": {
        "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), (2, 8, 17, 15), (12, 8, 3, 3), (12,)),
        "dilated": (lambda x, w: F.conv2d(x, w, padding=2, dilation=2), (2, 8, 17, 15), (12, 8, 3, 3)),
        "depthwise": (lambda x, w: F.conv2d(x, w, padding=1, groups=8), (2, 8, 17, 15), (8, 1, 3, 3)),
        "conv1d": (lambda x, w: F.conv1d(x, w, padding="same"), (2, 8, 33), (16, 8, 5)),
        "conv3d": (lambda x, w: F.conv3d(x, w), (1, 4, 7, 7, 7), (6, 4, 3, 3, 3)),
        "transposed": (
            lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1), (2, 8, 7, 9), (8, 6, 3, 3),
        ),
    },
    "pooling": {
        "max": (lambda x: (F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 3, 2, ceil_mode=True)), distinct(1, 4, 14, 15)),
        "average": (lambda x: (F.avg_pool2d(x, 3, 2, 1), F.avg_pool1d(x[0], 4)), (1, 4, 14, 16)),
        "fractional": (
            lambda x, at: F.fractional_max_pool2d(x, 3, (5, 6), _random_samples=at),
            distinct(1, 4, 14, 15), lambda: torch.rand(1, 4, 2),
        ),
        "adaptive": (lambda x: (F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (7, 4))), (1, 4, 14, 16)),
    },
    "normalization": {
        "layer": (lambda x, w, b: F.layer_norm(x, (64,), w, b), (4, 9, 64), (64,), (64,)),
        "batch": (lambda x, m, v: F.batch_norm(x, m, v), (4, 8, 5, 5), (8,), positive(8)),
        "group": (lambda x, w, b: F.group_norm(x, 4, w, b), (2, 8, 5, 5), (8,), (8,)),
        "instance": (F.instance_norm, (2, 8, 5, 5)),
        "rms": (lambda x, w: F.rms_norm(x, (64,), w), (4, 9, 64), (64,)),
        "softmax": (lambda x: (x.softmax(-1), x.log_softmax(1), x.softmax(0)), (4, 9, 33)),
    },
    "attention": {
        "plain": (F.scaled_dot_product_attention, (2, 4, 16, 32), (2, 4, 16, 32), (2, 4, 16, 32)),
        "causal": (functools.partial(F.scaled_dot_product_attention, is_causal=True), *[(2, 4, 16, 32)] * 3),
        "long_causal": (functools.partial(F.scaled_dot_product_attention, is_causal=True), *[(1, 2, 640, 64)] * 3),
        "masked": (F.scaled_dot_product_attention, *[(2, 4, 16, 32)] * 3, (2, 1, 16, 16)),
        "cross": (F.scaled_dot_product_attention, (2, 4, 5, 32), (2, 4, 21, 32), (2, 4, 21, 48)),
        "grouped": (
            functools.partial(F.scaled_dot_product_attention, enable_gqa=True), (2, 8, 9, 32), *[(2, 2, 9, 32)] * 2,
        ),
    },
    "views": {
        "reshape": (
            lambda x: (x.reshape(6, 20) + 1, x.permute(2, 0, 1) * 2, x[:, None].expand(4, 3, 5, 6) - 1), (4, 5, 6),
        ),
        "slices": (lambda x: (x[1:3, ::2] + 1, x[..., -1] * 2, x.narrow(1, 1, 3) - 1), (4, 5, 6)),
        "join": (lambda x, y: (torch.cat([x, y], 1), torch.stack([x, x * 2], -1)), (4, 5), (4, 5)),
        "turn": (lambda x: (x.flip(0, 2), x.roll(2, 1), x.tril(), x.triu(1)), (4, 5, 6)),
        "split": (lambda x: [part + 1 for part in x.split(2, 1)] + [x.chunk(3, 2)[1] * 2], (4, 5, 6)),
        "pixels": (lambda x: (F.pixel_shuffle(x, 2), F.unfold(x, 3)), (2, 8, 5, 6)),
    },
    "indexing": {
        "gather": (lambda x, i: (x.gather(1, i), torch.take_along_dim(x, i, 1)), (5, 7), integers(0, 7, 5, 3)),
        "select": (lambda x, i: (x.index_select(0, i), x[i], x[:, i]), (5, 7), integers(0, 5, 4)),
        "negative": (lambda x, i: x[i], (5, 7), integers(-5, 0, 6)),
        "embedding": (F.embedding, integers(0, 11, 3, 4), (11, 8)),
        "masked": (lambda x, y: x.masked_fill(y > 0, -1.5), (5, 7), (5, 7)),
    },
    "scatter": {
        "scatter": (lambda x, y: x.scatter(1, torch.arange(3, device=x.device).expand(5, 3), y), (5, 7), (5, 3)),
        "put": (lambda x, y: x.index_put((torch.arange(3, device=x.device),), y), (5, 7), (3, 7)),
        "add": (lambda x, i, y: x.index_add(0, i, y), (5, 7), integers(0, 5, 9), (9, 7)),
        "reduce": (
            lambda x, i, y: (x.scatter_add(0, i, y), x.scatter_reduce(0, i, y, "amax")),
            (5, 7), integers(0, 5, 9, 7), (9, 7),
        ),
    },
    "sorting": {
        "topk": (lambda x: x.topk(5, 1), distinct(4, 33)),
        "sort": (lambda x: (x.sort(1), x.argsort(0, descending=True)), distinct(4, 33)),
    },
    "scan": {"cumulative": (lambda x: (x.cumsum(1), x.cumprod(0)), positive(4, 9))},
    "padding": {
        "constant": (lambda x: F.pad(x, (1, 2, 0, 3), value=1.5), (2, 3, 5, 6)),
        "borders": (
            lambda x: [F.pad(x, (1, 2, 2, 1), mode) for mode in ("reflect", "replicate", "circular")], (2, 3, 5, 6),
        ),
    },
    "resampling": {
        "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), (1, 3, 6, 7)),
        "bilinear": (
            lambda x: [F.interpolate(x, (11, 9), mode="bilinear", align_corners=c) for c in (False, True)],
            (1, 3, 6, 7),
        ),
        "bicubic": (lambda x: F.interpolate(x, (11, 9), mode="bicubic"), (1, 3, 6, 7)),
    },
    "creation": {
        "ranges": (lambda x: torch.arange(x.shape[0], device=x.device) + x * 2 + torch.full_like(x, 0.5), (9,)),
    },
    "conversion": {
        "casts": (lambda x: (x.int() + 1, x.half() * 2, x.bool() | (x > 1), x.to(torch.int8) + 1), distinct(64)),
        "unsigned": (lambda x: (x + 1, x.float() / 255, x * 2), integers(0, 256, 64, dtype=torch.uint8)),
    },
    "complex": {
        "fourier": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, 32), (3, 32)),
        "products": (lambda x: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(x).conj()), (5, 2)),
    },
    "data_dependent": {"histogram": (lambda x: torch.histc(x, 8, -3, 3) * 2, distinct(40))},
    # Multiples of 1.2 steps lie between two of them nowhere.
    "quantization": {
        "tensor": (lambda x: torch.fake_quantize_per_tensor_affine(x.round() * 0.3, 0.25, 0, -128, 127) * 2, (5, 8)),
        "by_limit": (lambda x: fake_quantize(x.round() * 0.3, torch.full((), 31.75), 8, 0, False, False) * 2, (5, 8)),
    },
    "distance": {"pairs": (lambda x, y: (torch.cdist(x, y), F.cosine_similarity(x, x * 2 + 1)), (5, 8), (6, 8))},
}  # fmt: skip

# Those that run in a half type too, where the engines' kernels are others.
IN_HALF = {
    "activations.gelu", "matmul.linear", "matmul.batches", "convolution.conv2d", "convolution.depthwise",
    "convolution.transposed", "normalization.layer", "normalization.softmax", "normalization.rms",
    "attention.plain", "attention.causal", "attention.long_causal", "attention.masked", "reduction.sums",
}  # fmt: skip


def add_cases() -> None:
    """Puts the table among the cases."""
    for family, specs in OPERATORS.items():
        for name, spec in specs.items():
            add(f"ops.{family}.{name}", functools.partial(run, spec, None))
            for dtype in HALF_TYPES if f"{family}.{name}" in IN_HALF else ():
                short = str(dtype).removeprefix("torch.")
                add(f"ops.{family}.{name}.{short}", functools.partial(run, spec, dtype))


def add(name: str, run_it: Callable[[Trial], None]) -> None:
    CASES[name] = Case(name, run_it)


def run(spec: Spec, dtype: torch.dtype | None, trial: Trial) -> None:
    """One entry of the table, its floats in `dtype`."""
    function, *makers = spec
    tensors = [make() if callable(make) else torch.randn(make) for make in makers]
    if dtype is not None:
        # Small enough for sums of products to stay near 1, where the tolerance is.
        tensors = [(x / max(x.shape[-1], 1) ** 0.25).to(dtype) if x.is_floating_point() else x for x in tensors]
    trial.same(function, *tensors)


add_cases()
