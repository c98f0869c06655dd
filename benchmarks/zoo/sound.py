"""torchaudio's models, and recurrent networks of torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.case import Case, Inputs, add, load, settled

AUDIO = "torchaudio.models"


def conformer() -> nn.Module:
    return settled(
        load(AUDIO, "Conformer")(input_dim=64, num_heads=4, ffn_dim=128, num_layers=2, depthwise_conv_kernel_size=7)
    )


def emformer() -> nn.Module:
    return settled(
        load(AUDIO, "Emformer")(
            input_dim=64, num_heads=4, ffn_dim=128, num_layers=2, segment_length=4, right_context_length=2
        )
    )


def wav2vec2() -> nn.Module:
    return settled(
        load(AUDIO, "wav2vec2_model")(
            extractor_mode="group_norm",
            extractor_conv_layer_config=[(32, 10, 5), (32, 3, 2), (32, 3, 2)],
            extractor_conv_bias=False,
            encoder_embed_dim=64,
            encoder_projection_dropout=0.0,
            encoder_pos_conv_kernel=16,
            encoder_pos_conv_groups=4,
            encoder_num_layers=2,
            encoder_num_heads=4,
            encoder_attention_dropout=0.0,
            encoder_ff_interm_features=128,
            encoder_ff_interm_dropout=0.0,
            encoder_dropout=0.0,
            encoder_layer_norm_first=False,
            encoder_layer_drop=0.0,
            aux_num_out=30,
        )
    )


def conv_tasnet() -> nn.Module:
    return settled(
        load(AUDIO, "ConvTasNet")(
            num_sources=2,
            enc_kernel_size=16,
            enc_num_feats=64,
            msk_num_feats=32,
            msk_num_hidden_feats=64,
            msk_num_layers=3,
            msk_num_stacks=2,
        )
    )


def hdemucs() -> nn.Module:
    return settled(load(AUDIO, "HDemucs")(sources=["voice", "rest"], audio_channels=1, channels=8, depth=5))


def deepspeech() -> nn.Module:
    return settled(load(AUDIO, "DeepSpeech")(n_feature=40, n_hidden=64, n_class=30))


def mel() -> nn.Module:
    return settled(load("torchaudio.transforms", "MelSpectrogram")(n_fft=128, n_mels=20))


def frames(batch: int, length: int) -> Inputs:
    return (torch.randn(batch, length, 64), torch.arange(length - batch + 1, length + 1)), {}


def more_frames(batch: int, length: int) -> Inputs:
    """With the right context of an Emformer behind."""
    return (torch.randn(batch, length + 2, 64), torch.full((batch,), length)), {}


def wave(batch: int, length: int) -> Inputs:
    return (torch.randn(batch, length),), {}


def mono(batch: int, length: int) -> Inputs:
    return (torch.randn(batch, 1, length),), {}


def features(batch: int, length: int) -> Inputs:
    return (torch.randn(batch, 1, length, 40),), {}


def vectors(batch: int, length: int) -> Inputs:
    return (torch.randn(batch, length, 64),), {}


class Tagger(nn.Module):
    """Words to labels through two recurrent layers, both ways."""

    def __init__(self, kind: Callable[..., nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layers = kind(64, 96, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.Linear(2 * 96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layers(x)[0])
        return out


class Seq2Seq(nn.Module):
    """An encoder, and a decoder that begins with the encoder's state."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(64, 96, batch_first=True)
        self.decoder = nn.LSTM(64, 96, batch_first=True)
        self.head = nn.Linear(96, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, state = self.encoder(x)
        out: torch.Tensor = self.head(self.decoder(x.flip(1), state)[0])
        return out


class CellLoop(nn.Module):
    """A cell in a Python loop of a fixed length."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(64, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.new_zeros(x.shape[0], 96)
        for step in range(8):
            state = self.cell(x[:, step], state)
        return state


add(Case("torchaudio/conformer", "audio", conformer, frames, (12, 20), reads_numbers=True))
LENGTHS = "its code reads the longest length in each layer, and loops over segments"
add(Case("torchaudio/emformer", "audio", emformer, more_frames, (12, 16), LENGTHS, reads_numbers=True))
add(Case("torchaudio/wav2vec2", "audio", wav2vec2, wave, (2000, 2600)))
add(Case("torchaudio/conv-tasnet", "audio", conv_tasnet, mono, (800, 1200)))
add(Case("torchaudio/hdemucs", "audio", hdemucs, mono, (16384, 16384)))
add(Case("torchaudio/deepspeech", "audio", deepspeech, features, (12, 20)))
SKIPPED = "Dynamo does not trace torch.jit.isinstance, which its code calls"
add(Case("torchaudio/mel-spectrogram", "audio", mel, wave, (800, 1200), SKIPPED))
add(Case("torch/lstm", "recurrent", lambda: settled(Tagger(nn.LSTM)), vectors, (12, 20)))
add(Case("torch/gru", "recurrent", lambda: settled(Tagger(nn.GRU)), vectors, (12, 20)))
add(Case("torch/rnn", "recurrent", lambda: settled(Tagger(nn.RNN, nonlinearity="relu")), vectors, (12, 20)))
add(Case("torch/seq2seq", "recurrent", lambda: settled(Seq2Seq()), vectors, (12, 20)))
add(Case("torch/gru-cell-loop", "recurrent", lambda: settled(CellLoop()), vectors, (8, 8)))
