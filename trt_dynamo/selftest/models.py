"""Whole models, small ones, with random weights: each puts many converters together as real models do.

Their results end in a norm, so that they vary with the input by about 1: a tolerance then means something.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trt_dynamo.selftest.trial import CASES, Case, Trial

# A rounding is passed on through the layers, so a model may be further from eager than one operator.
LOOSE = {torch.float32: (2e-3, 2e-3), torch.float16: (5e-2, 5e-2), torch.bfloat16: (2e-1, 2e-1)}


def network(width: int = 32) -> nn.Module:
    """A small perceptron: two products and what is between them."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 8), nn.Softmax(-1)).eval()


def rows(*counts: int, width: int = 32) -> list[Tensor]:
    return [torch.randn(count, width) for count in counts]


def ids(*sizes: int) -> Tensor:
    return torch.randint(0, 101, sizes)


class Residual(nn.Module):
    """The block of a ResNet."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.short = nn.Conv2d(width, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


class Inverted(nn.Module):
    """The block of an EfficientNet: depthwise convolution, squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 4 * width
        self.expand = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.depth = nn.Sequential(nn.Conv2d(wide, wide, 5, 1, 2, groups=wide), nn.BatchNorm2d(wide), nn.SiLU())
        self.squeeze = nn.Sequential(nn.Conv2d(wide, width, 1), nn.SiLU(), nn.Conv2d(width, wide, 1), nn.Sigmoid())
        self.project = nn.Conv2d(wide, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.depth(self.expand(x))
        projected: Tensor = self.project(y * self.squeeze(y.mean((2, 3), keepdim=True)))
        return x + projected


class UNet(nn.Module):
    """Down, up and across, as in segmentation and diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.SiLU())
        self.up = nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.leave = nn.Sequential(nn.Conv2d(32, 3, 3, 1, 1), nn.GroupNorm(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        high = self.enter(x)
        low = F.interpolate(F.max_pool2d(self.down(high), 2), scale_factor=2.0, mode="bilinear")
        result: Tensor = self.leave(torch.cat([high, self.up(low)], 1))
        return result


class Decoder(nn.Module):
    """A language model of the LLaMA kind: rotary positions, causal attention, RMS norms, a gated feed-forward part."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(101, width)
        self.norm, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.rise = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.fall = nn.Linear(2 * width, width, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        place = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None]
        angle = place / 10000 ** (torch.arange(half, device=x.device, dtype=torch.float32) / half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        batch, length, width = x.shape
        split = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split[0], split[1], split[2]
        attended = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x)
        x = x + self.fall(F.silu(self.gate(y)) * self.rise(y))
        return F.linear(x, self.embed.weight)


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 24, 7, 2, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(stem, Residual(24), Residual(24, 2), nn.AdaptiveAvgPool2d(4), nn.GroupNorm(24, 24))


def efficient() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Inverted(8), Inverted(8), nn.GroupNorm(8, 8))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu", norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def mixer() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 4),
        nn.Flatten(2),
        nn.LayerNorm(64),
        nn.Linear(64, 64),
        nn.GELU(),
        nn.Linear(64, 10),
        nn.LayerNorm(10),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet": (resnet, lambda: torch.randn(2, 3, 64, 64)),
    "efficient": (efficient, lambda: torch.randn(2, 3, 32, 32)),
    "unet": (UNet, lambda: torch.randn(1, 3, 32, 32)),
    "encoder": (encoder, lambda: torch.randn(2, 17, 64)),
    "decoder": (Decoder, lambda: torch.randint(0, 101, (2, 19))),
    "mixer": (mixer, lambda: torch.randn(2, 3, 32, 32)),
}


def run(name: str, dtype: torch.dtype, trial: Trial) -> None:
    """A model in a dtype, without the settings that change it."""
    make, example = MODELS[name]
    model, x = make().eval().to(dtype), example()
    trial.same(model, x.to(dtype) if x.is_floating_point() else x, tolerance=LOOSE[dtype], timed=True)


def precision(name: str, chosen: str, trial: Trial) -> None:
    """A float32 model whose engine computes in a half type, by the setting `precision`."""
    make, example = MODELS[name]
    loose = LOOSE[torch.float16 if chosen == "fp16" else torch.bfloat16]
    trial.same(make().eval(), example(), tolerance=loose, timed=True, precision=chosen)
    # The worst of float32 is ten times nearer.
    assert trial.figures.difference > 1e-5, "the answers are those of float32: the setting had no effect"


for each in MODELS:
    for kind in LOOSE:
        short = str(kind).removeprefix("torch.")
        CASES[f"models.{each}.{short}"] = Case(f"models.{each}.{short}", functools.partial(run, each, kind))
    for half in ("fp16", "bf16"):
        CASES[f"precision.{each}.{half}"] = Case(f"precision.{each}.{half}", functools.partial(precision, each, half))
