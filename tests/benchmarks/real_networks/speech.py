"""Speech samples: espeak-ng reads sentences of scikit-learn's data set descriptions.

espeak-ng's waveforms vary slightly between processes, so another `prepare` gives other samples.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from real_networks.english import sentences

PACKAGES = ("espeakng-loader", "scikit-learn")
RATE = 16_000  # Hz

ACCENTS = ("en-us", "en-gb-x-rp")
VOICES = [f"{accent}+{kind}" for kind in ("m1", "f2", "m5", "f4") for accent in ACCENTS]
TEST_VOICES = [f"{accent}+{kind}" for kind in ("m3", "f1", "m7", "f3") for accent in ACCENTS]


class Synthesizer:
    """Text to speech at 16 kHz with the espeak-ng library of the package espeakng-loader."""

    def __init__(self, site: Path) -> None:
        folder = site / "espeakng_loader"
        self.library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
        data = str(folder / "espeak-ng-data").encode()
        self.rate = self.library.espeak_Initialize(2, 0, data, 0x8000)  # synchronous, no device
        if self.rate <= 0:
            raise RuntimeError("espeak-ng does not start")
        self.chunks: list[np.ndarray] = []

        def collect(wave: Any, count: int, _: Any) -> int:
            if wave and count:
                self.chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
            return 0

        short = ctypes.POINTER(ctypes.c_short)
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, short, ctypes.c_int, ctypes.c_void_p)
        self.callback = prototype(collect)  # must live as long as the library calls it
        self.library.espeak_SetSynthCallback(self.callback)

    def speak(self, text: str, voice: str, speed: int = 170, pitch: int = 50) -> np.ndarray:
        """Return the text in a voice such as en-us+f2, with samples in -1 .. 1."""
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"espeak-ng has no voice {voice}")
        self.library.espeak_SetParameter(1, speed, 0)
        self.library.espeak_SetParameter(3, pitch, 0)
        self.chunks.clear()
        utf8 = text.encode() + b"\0"
        self.library.espeak_Synth(utf8, len(utf8), 0, 0, 0, 1, None, None)  # 1: UTF-8
        return resample(np.concatenate(self.chunks) / 32768, self.rate, RATE)


def resample(wave: np.ndarray, old: int, new: int) -> np.ndarray:
    """Change the sampling rate by cutting or padding the spectrum."""
    count = round(len(wave) * new / old)
    spectrum = np.fft.rfft(wave)
    resized = np.zeros(count // 2 + 1, spectrum.dtype)
    resized[: min(len(resized), len(spectrum))] = spectrum[: len(resized)]
    return np.fft.irfft(resized, count) * (count / len(wave))


def speech(
    site: Path, voices: Sequence[str], part: int, count: int, length: int, seed: int
) -> np.ndarray:
    """Return excerpts of speech at random speeds and pitches, float32 [count,length]."""
    rng, synthesizer, texts = np.random.default_rng(seed), Synthesizer(site), sentences(site, part)
    excerpts = []
    for voice in itertools.islice(itertools.cycle(voices), count):
        text = " ".join(texts[index] for index in rng.integers(len(texts), size=2))
        speed, pitch = int(rng.integers(130, 220)), int(rng.integers(30, 75))
        wave = synthesizer.speak(text, voice, speed, pitch)
        start = int(rng.integers(max(1, len(wave) - length)))
        excerpt = wave[start : start + length]
        excerpts.append(np.pad(excerpt, (0, length - len(excerpt))))
    return np.stack(excerpts).astype(np.float32)


def add_noise(waves: np.ndarray, seed: int, low: float = -5, high: float = 30) -> np.ndarray:
    """Add noise of random color at a signal-to-noise ratio of `low` to `high` dB.

    One third of the waves become noise alone.
    """
    rng = np.random.default_rng(seed)
    count, length = waves.shape
    slope = rng.uniform(0, 2, (count, 1))
    frequency = np.maximum(np.arange(length // 2 + 1), 4)
    shape = (2, count, length // 2 + 1)
    spectrum = np.einsum("p,pcf->cf", np.array([1, 1j]), rng.standard_normal(shape))
    noise = np.fft.irfft(spectrum * frequency ** (-slope / 2), length)
    noise /= noise.std(1, keepdims=True)
    level = 0.05 * 10 ** (-rng.uniform(low, high, (count, 1)) / 20)
    has_voice = rng.random((count, 1)) > 1 / 3
    voice = waves * (0.05 / np.maximum(waves.std(1, keepdims=True), 1e-4))
    return (voice * has_voice + noise * level).astype(np.float32)


def mel_filters(bands: int, bins: int, rate: int) -> np.ndarray:
    """Return triangles of equal area on Slaney's mel scale, [bands,bins], librosa's default."""

    def hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(rate / 2000) / np.log(6.4)
    edges = hertz(np.linspace(0, top, bands + 2))
    ramps = edges[:, None] - np.linspace(0, rate / 2, bins)
    width = np.diff(edges)[:, None]
    rising, falling = -ramps[:-2] / width[:-1], ramps[2:] / width[1:]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]


def mel_spectrogram(waves: Tensor, bands: int, window: int, hop: int) -> Tensor:
    """Return the power in each mel band, [B,frames,bands]."""
    hann = torch.hann_window(window)
    spectrum = torch.stft(waves, window, hop, window=hann, pad_mode="constant", return_complex=True)
    filters = torch.from_numpy(mel_filters(bands, window // 2 + 1, RATE)).float()
    return (filters @ spectrum.abs().square()).transpose(1, 2)
