"""Figures of every layer, and overview sheets of all layers, written into a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ddqcli import plots
from ddqcli.errors import DDQError, UsageError
from ddqcli.inspection.checkpoint_rows import Progress
from ddqcli.inspection.html import Picture, is_own_page
from ddqcli.runs.files import make_folder
from ddqcli.runs.folder import make_own_folder

PAGE = "index.html"
PNG_LAYERS = 64  # most layers drawn as PNG too; of more, PNGs would take most of the time


@dataclass(frozen=True)
class FigureFolder:
    """A folder for figures, and the files written so far."""

    path: Path
    files: list[Path] = field(default_factory=list)

    def save(self, figure: Figure, stem: str, caption: str = "", *, png: bool = True) -> Picture:
        """Write a figure as SVG, and PNG; return it as a picture for a page."""
        path = self.path / stem
        if path.parent != self.path and path.parent.is_symlink():
            raise UsageError(f"{path.parent} is a link out of {self.path}; remove it.")
        path.parent.mkdir(exist_ok=True)
        self.files.extend(plots.save(figure, path, png=png))
        return page_picture(figure, caption, self.files[-1].read_text(encoding="utf-8"))


@dataclass(frozen=True)
class LayerPictures:
    """Pictures of layers, and of channels of depthwise layers, for a page."""

    layers: list[Picture] = field(default_factory=list)
    channels: list[Picture] = field(default_factory=list)


def page_picture(figure: Figure, caption: str = "", svg: str | None = None) -> Picture:
    """Return a figure as a picture for a page; `svg` is its document if that was made already."""
    width, height = figure.get_size_inches()
    element = plots.for_page(svg or plots.svg_of(figure))
    rows = max(1, int(height / (1.2 * plots.HEIGHT)))  # a row is higher by its captions
    return Picture(element, caption, wide=bool(width > plots.WIDTH), rows=rows)


def page_file(path: Path) -> Path:
    """Return `path` if it ends in .html or .htm and is no folder, else index.html in it.

    Raises UsageError if that name, which the user did not give, is another page's.
    """
    if path.suffix in {".html", ".htm"} and not path.is_dir():
        return path
    page = path / PAGE
    if page.exists() and not is_own_page(page):
        raise UsageError(f"{page} is no page of ddq and is not replaced; name another file.")
    return page


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Make the folder. Raises DDQError if it, or a file written inside the block, cannot be."""
    try:
        make_folder(path)
        yield
    except OSError as error:
        raise DDQError(
            f"Cannot write pictures into {path}: {error.strerror}; name another folder."
        ) from error


@contextmanager
def figure_folder(path: Path) -> Iterator[FigureFolder]:
    """Make the folder. Raises as `output_folder`; UsageError if it holds files of others."""
    with output_folder(path):
        make_own_folder(path, "pictures might replace them", "-o")
        yield FigureFolder(path)


def draw_layers(
    layers: Sequence[plots.Layer],
    channels: Mapping[int, np.ndarray],
    folder: FigureFolder,
    on_progress: Progress | None,
) -> LayerPictures:
    """Draw all layers into the folder; `channels` maps a layer's position to [C, 5] ranges."""
    pictures = LayerPictures()
    png = len(layers) <= PNG_LAYERS
    for position, layer in enumerate(layers):
        if on_progress:
            on_progress(position, len(layers), f"pictures of {layer.name}")
        stem = f"{position + 1:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', layer.name)[:100]}"
        figure = plots.layer_figure(layer)
        pictures.layers.append(folder.save(figure, f"layers/{stem}", png=png))
        if position in channels:
            figure = plots.channels_figure(layer.name, channels[position])
            pictures.channels.append(folder.save(figure, f"channels/{stem}", png=png))
    for number, figure in enumerate(plots.overview_figures(layers)):
        folder.save(figure, f"overview-{number + 1}")
    if on_progress:
        on_progress(len(layers), len(layers), "")
    return pictures
