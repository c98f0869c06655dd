"""A training step through the backend beside `backend="aot_eager"` and plain eager, interleaved, as ratios of medians.

Usage: python -m benchmarks.training_step [--steps 200] [--training eager|inductor]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return result


def step_of(model: Callable[..., torch.Tensor], parameters: list[nn.Parameter], x: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--training", choices=("eager", "inductor"), default="eager")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first = nn.Sequential(*[Block(64) for _ in range(6)]).to(device)
    x = torch.randn(16, 64, device=device)
    options = {"runtime": "reference", "training": chosen.training}
    compilers: dict[str, Callable[[nn.Module], Callable[..., torch.Tensor]]] = {
        "eager": lambda model: model,
        "aot_eager": lambda model: torch.compile(model, backend="aot_eager"),
        "tensorrt": lambda model: torch.compile(model, backend="tensorrt", options=options),
    }
    steps = {}
    for name, compiler in compilers.items():
        torch._dynamo.reset()
        model = copy.deepcopy(first)
        steps[name] = step_of(compiler(model), list(model.parameters()), x)
        steps[name]()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(chosen.steps):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, median in medians.items():
        print(f"{name:10} {median * 1e3:7.3f} ms, {median / medians['aot_eager']:.3f} of aot_eager")


if __name__ == "__main__":
    main()
