"""Colors safe for color-blind readers, and matplotlib settings independent of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

# The palette of Okabe and Ito.
BLUE, ORANGE, GREEN, VERMILLION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, YELLOW = "#56b4e9", "#cc79a7", "#f0e442"
GRAY = "#8c8c8c"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)

# Text and background. Nothing else has these colors, so that a page can replace them by its own.
INK, PAPER = "#1b1c1d", "#fefefe"

KIND_COLORS = {"conv": BLUE, "depthwise": ORANGE, "linear": GREEN, "embedding": PURPLE}
KIND_HATCHES = {"depthwise": "////", "linear": "\\\\\\\\", "embedding": "xxxx"}

# Distribution shapes, as `ddqcli.inspection.distribution` names them.
SHAPE_COLORS = {
    "Gaussian-like": BLUE,
    "heavy-tailed": ORANGE,
    "multi-peaked": GREEN,
    "flat": PURPLE,
    "as stored": SKY,  # an exported file: only counts per level are known
}

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
    "grid.color": GRAY,
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
    "text.parse_math": False,  # a layer may be called $x$
    "svg.hashsalt": "ddq",
    "path.simplify": True,
}


@contextmanager
def settings() -> Iterator[None]:
    """Use ddq's matplotlib settings instead of the user's. May be nested."""
    # Typed as Any: the keys of rcParams are literals that differ between matplotlib versions.
    params: Any = matplotlib.rcParams
    if params["svg.hashsalt"] == _SETTINGS["svg.hashsalt"]:
        yield  # already in use; setting all parameters again would be slow
        return
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        params.update(_SETTINGS)
        yield
