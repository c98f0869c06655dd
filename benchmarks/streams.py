"""Models that take requests of many sizes, and streams of such requests, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Arguments = tuple[Any, ...]
Sizes = tuple[int, ...]


class MiniLM(nn.Module):
    """The architecture of all-MiniLM-L6-v2, any size, with random weights: (batch, tokens) int64 twice to unit vectors
    (batch, hidden).
    """

    def __init__(self, layers: int = 6, hidden: int = 384) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=1000,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=12,
            intermediate_size=4 * hidden,
            max_position_embeddings=512,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


class UNet(nn.Module):
    """Two steps down and up, with batch norm, pooling, upsampling to the skip's own size, which may be odd."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
                nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            )  # fmt: skip

        self.first, self.second, self.inner = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.raised = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up2, self.up1 = block(4 * width, 2 * width), block(3 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x)
        two = self.second(F.max_pool2d(one, 2))
        three = self.raised(self.inner(F.max_pool2d(two, 2)))
        three = F.pad(three, (0, two.shape[3] - three.shape[3], 0, two.shape[2] - three.shape[2]))
        two = self.up2(torch.cat([two, three], 1))
        two = F.interpolate(two, size=one.shape[2:], mode="bilinear", align_corners=False)
        out: Tensor = self.out(self.up1(torch.cat([one, two], 1)))
        return out


class CNN(nn.Module):
    """A classifier whose convolutions stride, with a depthwise one, and whose pooling is global."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU6(),
            nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.Hardswish(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(width, 2 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out.log_softmax(-1)


class Detector(nn.Module):
    """A detector of one stage: what scores above the threshold, as boxes, scores and classes."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, width, 3, 2, 1), nn.SiLU()
        )
        self.head = nn.Conv2d(width, 4 + classes, 1)
        self.refine = nn.Linear(width, 4)

    def forward(self, image: Tensor, threshold: Tensor) -> dict[str, Tensor]:
        features = self.body(image)
        found = self.head(features).flatten(2).transpose(1, 2).flatten(0, 1)
        scores, classes = found[:, 4:].sigmoid().max(1)
        places = (scores > threshold).nonzero().squeeze(1)
        boxes, scores = found[places, :4], scores[places]
        rows = features.flatten(2).transpose(1, 2).flatten(0, 1)[places]
        boxes = boxes + torch.tanh(self.refine(rows))
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:].exp() / 2, boxes[:, :2] + boxes[:, 2:].exp() / 2], 1)
        return {"boxes": corners, "scores": scores * 2 - 1, "classes": torch.gather(classes, 0, places) + 1}


class Recurrent(nn.Module):
    """An LSTM in two directions over texts of different lengths, packed or padded, and a head on its last state."""

    def __init__(self, packed: bool, inputs: int = 12, hidden: int = 16) -> None:
        super().__init__()
        self.packed = packed
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.packed:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            states, (last, _) = self.lstm(packed)
            states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
        else:
            states, (last, _) = self.lstm(x)
            states = states * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        return self.head(states).softmax(-1), torch.cat([last[0], last[1]], 1)


class Mixer(nn.Module):
    """Attention from some tokens to others, and an MLP: three symbols that have nothing to do with one another."""

    def __init__(self, hidden: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(context), self.value(context))
        )
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class Audio(nn.Module):
    """Strided 1-D convolutions, a pooled gate, upsampling by a factor and to the length that came in."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv1d(2, width, 5, 2, 2), nn.GELU(), nn.Conv1d(width, width, 3, 2, 1))
        self.gate = nn.Linear(width, width)
        self.out = nn.Conv1d(width, 2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        y = y * self.gate(y.mean(-1)).sigmoid()[..., None]
        y = F.interpolate(F.interpolate(y, scale_factor=2.0), size=x.shape[-1], mode="linear")
        out: Tensor = self.out(y) + x
        return out


class Windows(nn.Module):
    """Sizes that are computed with: tokens padded to whole windows, taken apart and put together again."""

    def __init__(self, window: int = 4, hidden: int = 8) -> None:
        super().__init__()
        self.window = window
        self.inner = nn.Linear(window * hidden, window * hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        short = -length % self.window
        y = F.pad(x, (0, 0, 0, short)).reshape(batch, (length + short) // self.window, self.window * hidden)
        y = torch.relu(self.inner(y)).reshape(batch, length + short, hidden)[:, :length]
        return y.cumsum(1) / torch.arange(1, length + 1, device=x.device)[:, None] + x


def embed_arguments(sizes: Sizes) -> Arguments:
    batch, length = sizes
    mask = torch.arange(length)[None] < torch.randint(0, length + 1, (batch, 1))
    return torch.randint(0, 1000, (batch, length)), mask.long()


def image_arguments(sizes: Sizes) -> Arguments:
    batch, height, width = sizes
    return (torch.randn(batch, 3, height, width),)


def detector_arguments(sizes: Sizes) -> Arguments:
    return (*image_arguments(sizes), torch.rand(()) * 1.2)


def recurrent_arguments(sizes: Sizes) -> Arguments:
    batch, length = sizes
    return torch.randn(batch, length, 12), torch.randint(min(1, length), length + 1, (batch,))


def mixer_arguments(sizes: Sizes) -> Arguments:
    batch, length, other = sizes
    return torch.randn(batch, length, 16), torch.randn(batch, other, 16)


def audio_arguments(sizes: Sizes) -> Arguments:
    return (torch.randn(sizes[0], 2, sizes[1]),)


def window_arguments(sizes: Sizes) -> Arguments:
    return (torch.randn(*sizes, 8),)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A model and the requests that come to it: `limits` bound each of the sizes that `arguments` makes tensors of."""

    make: Callable[[], nn.Module]
    arguments: Callable[[Sizes], Arguments]
    limits: tuple[tuple[int, int], ...]

    def model(self) -> nn.Module:
        """The model with the same random weights each time, in eval mode."""
        torch.manual_seed(0)
        return self.make().eval()

    def sizes(self, draw: random.Random, smallest: int = 0, scale: float = 1.0) -> Sizes:
        """The sizes of a request: small ones as often as large ones, up to `scale` times the limits."""
        found = []
        for low, high in self.limits:
            low = max(low, smallest)
            high = max(low, int(high * scale))
            found.append(low + int((high - low + 1) ** draw.random()) - 1)
        return tuple(found)


STREAMS: dict[str, Stream] = {
    "MiniLM": Stream(lambda: MiniLM(2, 48), embed_arguments, ((0, 64), (0, 256))),
    "CNN": Stream(CNN, image_arguments, ((0, 40), (9, 120), (9, 120))),
    "U-Net": Stream(UNet, image_arguments, ((0, 6), (4, 130), (4, 130))),
    "detector": Stream(Detector, detector_arguments, ((0, 6), (1, 130), (1, 130))),
    "LSTM, padded": Stream(lambda: Recurrent(False), recurrent_arguments, ((0, 40), (0, 90))),
    "LSTM, packed": Stream(lambda: Recurrent(True), recurrent_arguments, ((1, 40), (1, 90))),
    "attention": Stream(Mixer, mixer_arguments, ((0, 30), (0, 200), (0, 200))),
    "audio": Stream(Audio, audio_arguments, ((0, 30), (1, 3000))),
    "windows": Stream(Windows, window_arguments, ((0, 50), (0, 500))),
}
