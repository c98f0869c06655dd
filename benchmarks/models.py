"""The models that tests and benchmarks share: plain torch, or Hugging Face's classes with random weights, of any
size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Made = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Residual(nn.Module):
    """ResNet's basic block, or its bottleneck with `expansion` 4."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        if expansion == 1:
            convolutions = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        else:
            convolutions = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        layers: list[nn.Module] = []
        for a, b, kernel, step in convolutions:
            layers += [nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


class ResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], expansion: int, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                stages.append(Residual(inputs, width << stage, 2 if stage and not index else 1, expansion))
                inputs = (width << stage) * expansion
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.stages(self.stem(x)), 1)
        out: torch.Tensor = self.head(torch.flatten(x, 1))
        return out


class Inverted(nn.Module):
    """MobileNet's inverted residual with squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.expand = nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(wide, wide // 4, 1),
            nn.SiLU(),
            nn.Conv2d(wide // 4, wide, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        out: torch.Tensor = x + y if self.same else y
        return out


def randomized(model: nn.Module) -> nn.Module:
    """In eval mode, with batch-norm statistics that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def resnet18(size: int = 64, batch: int = 2) -> Made:
    torch.manual_seed(0)
    return randomized(ResNet((2, 2, 2, 2), 1)), (torch.randn(batch, 3, size, size),)


def resnet50(size: int = 64, batch: int = 2) -> Made:
    torch.manual_seed(0)
    return randomized(ResNet((3, 4, 6, 3), 4)), (torch.randn(batch, 3, size, size),)


def mobilenet(size: int = 64, batch: int = 2) -> Made:
    torch.manual_seed(0)
    blocks = [Inverted(16, 16, 1, 2), Inverted(16, 24, 2, 4), Inverted(24, 24, 1, 3), Inverted(24, 40, 2, 3)]
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()]
    head = [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 100),
        nn.Hardswish(),
        nn.Dropout(0.2),
        nn.Linear(100, 10),
    ]
    return randomized(nn.Sequential(*stem, *blocks, *head)), (torch.randn(batch, 3, size, size),)


def bert(layers: int = 12, hidden: int = 768, batch: int = 2, length: int = 32) -> Made:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden
    )
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return BertModel(config).eval(), (torch.randint(0, 1000, (batch, length)), mask)


def gpt2(layers: int = 12, hidden: int = 768, batch: int = 2, length: int = 32) -> Made:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=hidden, n_head=hidden // 64, use_cache=False)
    return GPT2Model(config).eval(), (torch.randint(0, 1000, (batch, length)),)


def vit(layers: int = 12, hidden: int = 768, batch: int = 2, size: int = 64) -> Made:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        image_size=size,
    )
    return ViTModel(config).eval(), (torch.randn(batch, 3, size, size),)


MODELS: dict[str, Callable[..., Made]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet": mobilenet,
    "bert": bert,
    "gpt2": gpt2,
    "vit": vit,
}
