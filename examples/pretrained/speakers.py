"""Tells voices apart with Resemblyzer's pretrained LSTM: `python examples/pretrained/speakers.py`.

Needs both requirement files of this folder, see requirements.txt; the weights lie in the package resemblyzer.
Without a supported GPU: `TRT_DYNAMO_RUNTIME=reference python ...`.
"""

import numpy as np
import torch
from resemblyzer import VoiceEncoder

import trt_dynamo

RATE = 16000  # samples a second


def voice(pitch: float, formants: tuple[float, ...], seconds: float, seed: int) -> np.ndarray:
    """A voice that hums vowels: overtones of a pitch in Hz that wavers, loudest around the formants, and breath."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.05 * np.sin(5 * time + random.uniform(0, 6)))) / RATE
    loud = [sum(np.exp(-(((k * pitch - f) / 250) ** 2)) for f in formants) + 0.02 for k in range(1, 25)]
    hum = sum(level * np.sin(k * phase) for k, level in enumerate(loud, 1))
    syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * time + random.uniform(0, 6))
    return (0.05 * hum * syllables + 0.001 * random.normal(size=len(time))).astype(np.float32)


DEEP, HIGH = (110.0, (500.0, 1100.0, 2400.0)), (230.0, (800.0, 1900.0, 3000.0))
CLIPS = {
    "deep, 1 s": voice(*DEEP, 1, 0),
    "deep, 4.3 s": voice(*DEEP, 4.3, 1),
    "high, 2 s": voice(*HIGH, 2, 2),
    "high, 15 s": voice(*HIGH, 15, 3),
    "high, 0.2 s": voice(*HIGH, 0.2, 4),
    "silence": np.zeros(RATE, np.float32),
}


def main() -> None:
    torch._dynamo.config.allow_rnn = True  # else Dynamo leaves every nn.LSTM to eager
    model, fast = VoiceEncoder(verbose=False), VoiceEncoder(verbose=False)
    fast.compile(backend="tensorrt", dynamic=True)  # in place, so that its own methods use engines
    voices, largest = {}, 0.0
    for name, clip in CLIPS.items():
        # One row for each 1.6 seconds, overlapping: the batch follows the length of the clip.
        voices[name], rows, _ = fast.embed_utterance(clip, return_partials=True)
        _, expected, _ = model.embed_utterance(clip, return_partials=True)
        largest = max(largest, float(np.abs(rows - expected).max()))
    for name in list(CLIPS)[1:]:
        print(f"likeness of '{name}' to 'deep, 1 s': {voices[name] @ voices['deep, 1 s']:.2f}")
    print(f"largest difference from eager: {largest:.1e}")
    for name in ("graphs", "engines_built", "engine_calls", "eager_calls"):
        print(f"{name}: {trt_dynamo.report()[name]}")


if __name__ == "__main__":
    main()
