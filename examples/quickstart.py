"""Compiles a small network and says what became of it: `python examples/quickstart.py`.

On a machine without a supported GPU: `TRT_DYNAMO_RUNTIME=reference python examples/quickstart.py`.
"""

import torch

import trt_dynamo


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
        )
        self.head = torch.nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.features(images).mean((2, 3)))
        return scores


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Classifier().eval().to(device)
    images = torch.randn(8, 3, 32, 32, device=device)
    fast = torch.compile(model, backend="tensorrt")
    with torch.no_grad():
        difference = (fast(images) - model(images)).abs().max().item()
    print(f"largest difference from eager: {difference:.1e}")
    for name, value in trt_dynamo.report().items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
