"""Figures as PNG and SVG files, and as SVG elements of an HTML page."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ddqcli.formatting import visible
from ddqcli.plots.style import INK, PAPER, settings
from ddqcli.runs.files import write_atomic


def save(figure: Figure, stem: Path, *, png: bool = True) -> tuple[Path, ...]:
    """Write `stem`.png (unless `png` is False) and `stem`.svg; return their paths.

    The same figure gives the same bytes. Raises UsageError or DDQError if they cannot be written.
    """
    png_path, svg_path = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    if png:
        # A palette of 256 holds these flat colors in a third of the bytes; octree keeps rare ones.
        image = _render(figure).convert("RGB")
        image = image.quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        write_atomic(png_path, lambda temporary: image.save(temporary, "PNG"))
    svg = svg_of(figure).encode()
    write_atomic(svg_path, lambda temporary: temporary.write_bytes(svg))
    return (png_path, svg_path) if png else (svg_path,)


def _render(figure: Figure) -> Image.Image:
    """Return the figure as an image at 144 dots per inch."""
    with settings():
        figure.set_dpi(144)
        canvas: Any = FigureCanvasAgg(figure)  # its methods have no annotations
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba()))


def svg_of(figure: Figure) -> str:
    """Return the figure as an SVG document, with its label for screen readers."""
    buffer = io.StringIO()
    with settings():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    label = escape(visible(str(figure.get_label())))
    svg = buffer.getvalue().replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return "\n".join(map(visible, svg.split("\n")))  # XML allows no control codes


def for_page(svg: str) -> str:
    """Convert an SVG document to an element of an HTML page.

    The background becomes transparent, the text takes the page's color, and size, metadata and
    unused ids are dropped.
    """
    element = svg[svg.index("<svg") :].replace(PAPER, "none").replace(INK, "currentColor")
    element = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\"",
        "",
        element,
        flags=re.DOTALL,
    )
    used_ids = set(re.findall(r"#([\w-]+)", element))
    element = re.sub(
        r' id="([^"]*)"', lambda match: match[0] if match[1] in used_ids else "", element
    )
    element = re.sub(r"\s*\n\s*", " ", element).strip()
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", element, count=2)
