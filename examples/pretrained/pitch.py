"""Finds the pitch of sounds with the pretrained CREPE: `python examples/pretrained/pitch.py [tiny|full]`.

Needs `pip install -r examples/pretrained/requirements.txt`; the weights lie in the package torchcrepe.
Without a supported GPU: `TRT_DYNAMO_RUNTIME=reference python ...`.
"""

import sys

import numpy as np
import torch
import torchcrepe

import trt_dynamo

RATE = 16000  # samples a second


def sweep(start: float, end: float, seconds: float) -> torch.Tensor:
    """A tone that goes from one frequency in Hz to another, with two overtones: (1, samples)."""
    phase = 2 * torch.pi * torch.linspace(start, end, round(seconds * RATE)).cumsum(0) / RATE
    return sum(torch.sin(number * phase) / number for number in (1, 2, 3))[None]


SOUNDS = {
    "a sweep over three octaves": sweep(110, 880, 1),
    "a tone in noise": sweep(220, 220, 3.3) + 0.3 * torch.randn(1, round(3.3 * RATE), generator=torch.manual_seed(0)),
    "silence": torch.zeros(1, RATE),
    "a click": sweep(1000, 1000, 0.07),
    "a slow fall": sweep(700, 150, 8),
}


def pitch(network: torch.nn.Module, capacity: str, sound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The frequency in Hz for every hundredth of a second, and how sure the network is, 0 to 1: both (1, frames)."""
    torchcrepe.infer.model, torchcrepe.infer.capacity = network, capacity  # where the package keeps its network
    np.random.seed(0)  # the package adds a little noise to each frequency
    return torchcrepe.predict(
        sound,
        RATE,
        RATE // 100,
        model=capacity,
        decoder=torchcrepe.decode.argmax,
        return_periodicity=True,
        batch_size=512,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )


def main(capacity: str = "tiny") -> None:
    torchcrepe.load.model("cuda" if torch.cuda.is_available() else "cpu", capacity)
    model = torchcrepe.infer.model
    fast = torch.compile(model, backend="tensorrt", dynamic=True)
    largest = 0.0
    for name, sound in SOUNDS.items():
        hertz, sure = pitch(fast, capacity, sound)
        for found, expected in zip((hertz, sure), pitch(model, capacity, sound), strict=True):
            largest = max(largest, (found - expected).abs().max().item())
        print(f"{name}: from {hertz[0, 3]:.0f} to {hertz[0, -4]:.0f} Hz")
    print(f"largest difference from eager: {largest:.1e}")
    for name in ("graphs", "engines_built", "engine_calls", "eager_calls"):
        print(f"{name}: {trt_dynamo.report()[name]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
