"""English words and sentences of scikit-learn's data set descriptions, split in two halves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np


def descriptions(site: Path) -> list[str]:
    """Return the texts in scikit-learn's package."""
    folder = site / "sklearn" / "datasets" / "descr"
    return [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.rst"))]


def words(site: Path, part: int) -> list[str]:
    """Return the lowercase words of half 0 or 1, in random order; no word is in both."""
    text = " ".join(descriptions(site))
    distinct = sorted({word.lower() for word in re.findall(r"\b[A-Za-z]{3,12}\b", text)})
    order = np.random.default_rng(0).permutation(len(distinct))
    return [distinct[index] for index in order][part::2]


def sentences(site: Path, part: int) -> list[str]:
    """Return every other line of prose, from half 0 or 1."""
    return [
        line
        for text in descriptions(site)
        for line in text.splitlines()
        if len(line.split()) > 6 and re.fullmatch(r"[A-Za-z][A-Za-z ,.'()-]+", line)
    ][part::2]
