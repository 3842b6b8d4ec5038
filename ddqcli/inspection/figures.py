"""What the pictures of all sources share: every layer, sheets of all layers, and the folder they go into."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ddqcli import plots
from ddqcli.errors import DDQError
from ddqcli.inspection.weights import Progress

PAGE = "index.html"
MANY = (
    64  # layers; of more, the single pictures are SVG only: their PNGs would take most of the time
)


@dataclass(frozen=True)
class Drawn:
    """The files that were written, and the pictures of layers and channels as elements of a page."""

    files: list[Path] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)


@contextmanager
def folder(out: Path) -> Iterator[None]:
    """Within: `out` exists, and what the disk refuses becomes one sentence. Raises DDQError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DDQError(
            f"Cannot write pictures into {out}: {error.strerror}; name another folder."
        ) from error


def draw_layers(
    layers: Sequence[plots.Layer],
    channels: Mapping[int, np.ndarray],
    out: Path,
    on_progress: Progress | None,
) -> Drawn:
    """Write the pictures into `out`; `channels` holds [C, 5] ranges by the number of the layer."""
    drawn = Drawn()

    def draw(figure: Figure, stem: Path, elements: list[str]) -> None:
        stem.parent.mkdir(exist_ok=True)
        files = plots.save(figure, stem, png=len(layers) <= MANY)
        drawn.files.extend(files)
        elements.append(plots.for_page(files[-1].read_text(encoding="utf-8")))

    for done, layer in enumerate(layers):
        if on_progress:
            on_progress(done, len(layers), f"pictures of {layer.name}")
        stem = f"{done + 1:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', layer.name)[:100]}"
        draw(plots.layer_figure(layer), out / "layers" / stem, drawn.layers)
        if done in channels:
            draw(
                plots.channels_figure(layer.name, channels[done]),
                out / "channels" / stem,
                drawn.channels,
            )
    for number, figure in enumerate(plots.overview_figures(layers)):
        drawn.files.extend(plots.save(figure, out / f"overview-{number + 1}"))
    if on_progress:
        on_progress(len(layers), len(layers), "")
    return drawn
