"""Hears where somebody speaks with the pretrained Silero VAD: `python examples/pretrained/speech.py`.

Needs `pip install -r examples/pretrained/requirements.txt`; the weights lie in the package silero-vad. Its own model is
TorchScript, which Dynamo does not look into; so the network is written here once more, takes the package's weights,
and is compared with it too.
Without a supported GPU: `TRT_DYNAMO_RUNTIME=reference python ...`.
"""

import torch
from silero_vad import load_silero_vad
from torch import Tensor, nn
from torch.nn import functional as F

import trt_dynamo

RATE, CHUNK, BEFORE = 16000, 512, 64  # samples: in a second, new in each call, and of the chunk before it


class Vad(nn.Module):
    """The network for 16 kHz: a spectrum by convolution, four convolutions, an LSTM cell, the probability of speech."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, padding=1), nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, stride=2, padding=1), nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(streams, 576) and the state, (streams, 128) twice, to the probability, (streams,), and the next state."""
        waves = self.stft_conv(F.pad(sound, (0, BEFORE), "reflect").unsqueeze(1))
        x = (waves[:, :129] ** 2 + waves[:, 129:] ** 2).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = convolution(x).relu()
        hidden, cell = self.lstm_cell(x.squeeze(-1), (hidden, cell))
        return self.final_conv(hidden.relu().unsqueeze(-1)).sigmoid().flatten(), hidden, cell


def listen(network: nn.Module, sounds: Tensor) -> Tensor:
    """Chunk by chunk, as sound comes in, the state going round: (streams, samples) to (streams, chunks)."""
    sounds = F.pad(sounds, (BEFORE, -sounds.shape[1] % CHUNK))
    hidden = cell = sounds.new_zeros(len(sounds), 128)
    speech = []
    with torch.no_grad():
        for piece in sounds.unfold(1, BEFORE + CHUNK, CHUNK).unbind(1):
            found, hidden, cell = network(piece, hidden, cell)
            speech.append(found)
    return torch.stack(speech, 1)


def vowels(pitch: float, seconds: float) -> Tensor:
    """A second without a sound, vowels on a falling pitch in Hz, again a second without: (samples,)."""
    time = torch.arange(round(seconds * RATE)) / RATE
    phase = 2 * torch.pi * (pitch * (1 - 0.1 * time / seconds)).cumsum(0) / RATE
    level = torch.exp(-(((pitch * torch.arange(1, 25)[:, None] - torch.tensor([600, 1200, 2500])) / 200) ** 2)).sum(1)
    hum = sum(loud * torch.sin(k * phase) for k, loud in enumerate(level, 1)) * (0.5 + 0.5 * torch.sin(25 * time))
    return F.pad(0.1 * hum, (RATE, RATE)) + 0.001 * torch.randn(len(time) + 2 * RATE)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Vad().eval().to(device)
    packaged = load_silero_vad()
    weights = packaged._model.state_dict().values()  # that for 16 kHz, in the same order
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    fast = torch.compile(model, backend="tensorrt", dynamic=True)
    voice = vowels(120, 1.5).to(device)
    streams = torch.stack([voice, voice.flip(0), 0.1 * voice])
    sounds = [voice[None], torch.zeros(1, RATE, device=device), streams, voice[None, :99]]
    expected = [listen(model, sound) for sound in sounds]
    largest = max((listen(fast, sound) - e).abs().max().item() for sound, e in zip(sounds, expected, strict=True))
    original = packaged.audio_forward(voice[None].cpu(), RATE)
    print(f"largest difference of this network from the package's: {(expected[0].cpu() - original).abs().max():.1e}")
    print("speech:", "".join("-#"[p > 0.5] for p in expected[0][0].tolist()))
    print(f"largest difference from eager: {largest:.1e}")
    for name in ("graphs", "engines_built", "engine_calls", "eager_calls"):
        print(f"{name}: {trt_dynamo.report()[name]}")


if __name__ == "__main__":
    main()
