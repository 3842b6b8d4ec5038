"""Figures laid out in inches from the lower left corner: axes, text, legends and titles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddqcli.plots.style import INK

# Inches. A page puts figures of WIDTH side by side, and a WIDE one across.
WIDTH, HEIGHT = 4.4, 3.3
WIDE = 12.7


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    return Figure(figsize=(width, height))


def add_axes(
    figure: Figure, left: float, bottom: float, width: float, height: float, **kwargs: Any
) -> Axes:
    """Add axes at a position and size in inches."""
    w, h = figure.get_size_inches()
    return figure.add_axes((left / w, bottom / h, width / w, height / h), **kwargs)


def add_text(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    size: float = 7.5,
    bold: bool = False,
    color: str = INK,
) -> None:
    """Add text that starts at x and is vertically centered on y, in inches."""
    width, height = figure.get_size_inches()
    weight = "bold" if bold else "normal"
    figure.text(
        x / width, y / height, text, fontsize=size, fontweight=weight, color=color, va="center"
    )


def add_title(figure: Figure, text: str, description: str = "", size: float = 11) -> None:
    """Add a bold title at the top left, and make it the figure's label.

    Screen readers speak the label, with the `description` of what a reader sees.
    """
    figure.set_label(f"{text}: {description}" if description else text)
    add_text(figure, 0.12, figure.get_figheight() - 0.2, text, size=size, bold=True)


def add_color_legend(figure: Figure, x: float, y: float, colors: Mapping[str, str]) -> float:
    """Add a one-line legend: a colored square before each label. Return where it ends."""
    for label, color in colors.items():
        add_text(figure, x, y, "■", size=8, color=color)
        add_text(figure, x + 0.13, y, label)
        x += 0.36 + 0.065 * len(label)
    return x


def limit_shares(axes: Axes, values: Sequence[float], label: str) -> None:
    """Label the y axis; keep it within 0 and 100 for the values of a metric in percent."""
    axes.set_ylabel(label)
    finite = [value for value in values if np.isfinite(value)]
    if label.endswith(", %") and finite and min(finite) >= 0 and max(finite) <= 100:
        margin = max(1.0, 0.1 * (max(finite) - min(finite)))
        axes.set_ylim(max(0, min(finite) - margin), min(100, max(finite) + margin))


def add_legend(figure: Figure, y: float, **kwargs: Any) -> None:
    """Add matplotlib's legend at the left edge; `y` is a share of the figure's height."""
    figure.legend(
        bbox_to_anchor=(0.12 / figure.get_figwidth(), y),
        borderaxespad=0.4,
        borderpad=0,
        **{"ncols": 4, **kwargs},
    )
