"""What goes to TensorRT, and why the rest does not: `trt-dynamo explain examples/explain_model.py:make`."""

import torch


class Picky(torch.nn.Module):
    """Most of it goes to TensorRT. Random numbers come from torch, so that each call has others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.layers(x).softmax(-1)
        noise = torch.rand_like(scores)
        return scores, (scores + noise).sigmoid().sum(-1)


def make() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return Picky().eval(), (torch.randn(4, 16),)
