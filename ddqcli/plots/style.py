"""What all pictures share: colours safe for colour-blind eyes, sizes in inches, and files that come out the same."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, YELLOW = "#56b4e9", "#cc79a7", "#f0e442"
GREY = "#8c8c8c"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)

INK, PAPER = "#1b1c1d", "#fefefe"  # used for nothing else, so that a page can swap them for its own
WIDE = 330  # points; a wider picture is scrolled on a phone rather than shrunk until nobody can read it

KIND_COLOURS = {"conv": BLUE, "depthwise": ORANGE, "linear": GREEN, "embedding": PURPLE}
KIND_HATCHES = {"depthwise": "////", "linear": "\\\\\\\\", "embedding": "xxxx"}

_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "grid.color": GREY,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "ddq",
    "path.simplify": True,
}


@contextmanager
def settings() -> Iterator[None]:
    """Matplotlib's settings for our pictures, whatever the user's own are."""
    if matplotlib.rcParams["svg.hashsalt"] == _SETTINGS["svg.hashsalt"]:
        yield  # within another `settings`
        return
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return Figure(figsize=(width, height))


def place(
    figure: Figure, left: float, bottom: float, width: float, height: float, **kwargs: Any
) -> Axes:
    """Axes at a place given in inches from the figure's lower left corner."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h), **kwargs)


def write(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    size: float = 7.5,
    bold: bool = False,
    color: str = INK,
) -> None:
    """Text that starts at x and is centred on y, in inches from the lower left corner."""
    width, height = figure.get_size_inches()
    weight = "bold" if bold else "normal"
    figure.text(
        x / width, y / height, text, fontsize=size, fontweight=weight, color=color, va="center"
    )


def squares(figure: Figure, x: float, y: float, colours: Mapping[str, str]) -> None:
    """A legend in one line: a coloured square before each word."""
    for word, colour in colours.items():
        write(figure, x, y, "■", size=8, color=colour)
        write(figure, x + 0.13, y, word)
        x += 0.36 + 0.065 * len(word)


def save(figure: Figure, stem: Path, *, png: bool = True) -> tuple[Path, ...]:
    """Write `stem`.png, unless told not to, and `stem`.svg; the same bytes for the same picture."""
    dotted, vector = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    if png:
        with settings():
            figure.set_dpi(144)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        # A palette shows these flat colours as well, in a third of the bytes; this way of choosing it keeps rare ones.
        image.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(dotted)
    vector.write_text(svg_of(figure), encoding="utf-8", newline="\n")
    return (dotted, vector) if png else (vector,)


def svg_of(figure: Figure) -> str:
    """The figure as an SVG document."""
    buffer = io.StringIO()
    with settings():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def for_page(svg: str) -> str:
    """An SVG document as an element of a page: no background, ink in the page's text colour, nothing superfluous."""
    element = svg[svg.index("<svg") :].replace(PAPER, "none").replace(INK, "currentColor")
    element = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\"",
        "",
        element,
        flags=re.DOTALL,
    )
    used = set(re.findall(r"#([\w-]+)", element))
    element = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", element)
    element = re.sub(r"\s*\n\s*", " ", element).strip()
    width = re.findall(r' width="([\d.]+)pt"', element)[0]
    size = f'<svg class="{"wide" if float(width) > WIDE else "small"}" style="width:{width}pt" '
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", element, count=2).replace("<svg ", size, 1)
