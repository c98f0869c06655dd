"""One engine for every batch from 1 to 64: `python examples/dynamic_sizes.py`.

Without `mark_dynamic`, Dynamo compiles the first size as it is and makes the batch symbolic at the second.
"""

import torch

import trt_dynamo


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = [torch.nn.Linear(32, 64), torch.nn.LayerNorm(64), torch.nn.GELU(), torch.nn.Linear(64, 8)]
    model = torch.nn.Sequential(*layers).eval().to(device)
    fast = torch.compile(model, backend="tensorrt")
    first = torch.randn(16, 32, device=device)
    torch._dynamo.mark_dynamic(first, 0, min=2, max=64)
    with torch.no_grad():
        fast(first)
        for size in (2, 7, 64, 33):
            x = torch.randn(size, 32, device=device)
            print(f"{size} rows: largest difference from eager {(fast(x) - model(x)).abs().max().item():.1e}")
        # Outside the range Dynamo compiles anew, and an engine that cannot take a size answers in eager.
        fast(torch.randn(100, 32, device=device))
    counts = trt_dynamo.report()
    print(f"graphs {counts['graphs']}, engine calls {counts['engine_calls']}, eager calls {counts['eager_calls']}")


if __name__ == "__main__":
    main()
