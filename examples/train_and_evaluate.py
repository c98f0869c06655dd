"""Trains a CNN and a transformer, each twice, and evaluates after every epoch: in eager, and through TensorRT.

`python examples/train_and_evaluate.py`; without a supported GPU `TRT_DYNAMO_RUNTIME=reference python ...`.

The only difference between the two runs is `torch.compile(model, backend="tensorrt")`. The losses and the trained
weights are equal bit for bit, because a graph that may need gradients runs in eager; the evaluations, of the model and
of a moving average of its weights, go through engines, for which each epoch brings other weights.
"""

import copy
import os
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trt_dynamo

EPOCHS, BATCH = 5, 32

# The call that first sees other weights waits for an engine that can be refitted; else eager answers meanwhile.
OPTIONS = {"rebuild": "sync"}

Data = tuple[torch.Tensor, torch.Tensor]


class Cnn(nn.Module):
    """Tells stripes of three directions apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 16, 3, stride=2), nn.Linear(16, 3)
        self.dropout = nn.Dropout(0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(images)))
        scores: torch.Tensor = self.head(self.dropout(F.relu(self.second(x)).mean((2, 3))))
        return scores


class Transformer(nn.Module):
    """Says whether the token that comes first is one of the most frequent kind, odd or even."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 32), nn.Parameter(torch.randn(16, 32) * 0.1)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.layer(self.tokens(tokens) + self.places)[:, 0])
        return scores


def stripes(count: int) -> Data:
    kind, phase = torch.randint(3, (count,)), torch.rand(count) * 6.3
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    place = torch.stack([x, y, x + y])[kind]
    images = torch.sin(place + phase[:, None, None]) + 2 * torch.randn(count, 12, 12)
    return images.unsqueeze(1), kind


def sentences(count: int) -> Data:
    tokens = torch.randint(20, (count, 16))
    odd = (tokens % 2).sum(1) > 8
    return tokens, (odd == tokens[:, 0] % 2).long()


def batches(data: Data, device: str) -> Iterator[Data]:
    for inputs, labels in zip(*(part.split(BATCH) for part in data), strict=True):
        yield inputs.to(device), labels.to(device)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, device: str) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    scores = torch.cat([model(inputs) for inputs, _ in batches(data, device)])
    labels = data[1].to(device)
    return F.cross_entropy(scores, labels).item(), (scores.argmax(1) == labels).float().mean().item()


def train(start: nn.Module, make_data: Callable[[int], Data], device: str, *, compiled: bool) -> list[list[float]]:
    """Each epoch's training loss, then the loss and accuracy of the model and of its moving average."""
    torch.manual_seed(1)
    data, held_out = make_data(640), make_data(192)
    plain = copy.deepcopy(start).to(device)
    average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    model, averaged = plain, average.module
    if compiled:
        model = torch.compile(plain, backend="tensorrt", options=OPTIONS)
        averaged = torch.compile(average.module, backend="tensorrt", options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    curves = []
    for _ in range(EPOCHS):
        model.train()
        total = 0.0
        for inputs, labels in batches(data, device):
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(plain)
            total += loss.item()
        curves.append([total, *evaluate(model, held_out, device), *evaluate(averaged, held_out, device)])
    return curves


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Else two runs of eager itself differ on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    for kind, make_data in ((Cnn, stripes), (Transformer, sentences)):
        torch.manual_seed(0)
        start = kind()
        eager = train(start, make_data, device, compiled=False)
        ours = train(start, make_data, device, compiled=True)
        assert [row[0] for row in ours] == [row[0] for row in eager], "the training differs"
        difference = max(
            abs(a - b) for mine, its in zip(ours, eager, strict=True) for a, b in zip(mine, its, strict=True)
        )
        for epoch, (loss, _, accuracy, _, smoothed) in enumerate(ours):
            print(f"{kind.__name__} epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.3f}, averaged {smoothed:.3f}")
        print(f"{kind.__name__}: largest difference from eager: {difference:.1e}")
    counts = trt_dynamo.report()
    print(
        f"engine calls: {counts['engine_calls']}, eager calls {counts['eager_reasons']}, "
        f"{counts['rebuilds']} rebuilds, {counts['refits']} refits"
    )


if __name__ == "__main__":
    main()
