"""The pictures of `ddq inspect` for a checkpoint: layers, sheets, channels of depthwise layers, and one page of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ddqcli import plots
from ddqcli.formatting import count, percent, size
from ddqcli.inspection import html
from ddqcli.inspection.distribution import FLAT, HEAVY
from ddqcli.inspection.figures import PAGE, draw_layers, folder
from ddqcli.inspection.weights import (
    ERROR_BITS,
    LEVEL_BITS,
    TOTAL_BITS,
    InspectResult,
    LayerRow,
    Progress,
)

KINDS = ("uniform", "power_of_two", "best")


def write_pictures(
    result: InspectResult, out: Path, on_progress: Progress | None = None
) -> InspectResult:
    """Write PNG and SVG files and the page into `out`; the result then names them, the page first. Raises DDQError."""
    with folder(out):
        shown = [_layer(row) for row in result.layers]
        channels = {
            k: np.array(row.channels) for k, row in enumerate(result.layers) if row.channels
        }
        drawn = draw_layers(shown, channels, out, on_progress)
        page = html.write_html(
            out / PAGE,
            f"Weights of {result.path.name}",
            _sections(result, drawn.layers, drawn.channels),
        )
    return replace(result, pictures=(page, *drawn.files))


def _layer(row: LayerRow) -> plots.Layer:
    levels = f"best {len(row.levels)} levels ({LEVEL_BITS} bits, Lloyd-Max)"
    return plots.Layer(
        row.name, row.kind, row.distribution, row.min, row.max, row.histogram, row.levels, levels
    )


def _sections(result: InspectResult, layers: list[str], channels: list[str]) -> list[html.Section]:
    rest = result.rest
    sections = [
        html.Section(
            "Size",
            [
                f"{result.path}: {result.note}.",
                f"Biases, norms and counters ({rest['tensors']} tensors, {size(rest['bytes'])}) stay as stored and are "
                "counted in every size.",
            ],
            _sizes(result),
        ),
        html.Section(
            "Layers",
            [
                "Error: sum of squared differences after quantization over the sum of squares, in per cent, with uniform, "
                "power-of-two and best (Lloyd-Max) levels at 2, 3, 4 and 8 bits.",
                "Tail: reach of the outer 1 % of the weights over that of the inner half; a Gaussian has 1. Heavy-tailed "
                f"from {HEAVY} on, flat up to {FLAT}, multi-peaked where the smoothed density dips between two peaks.",
            ],
            _layer_table(result),
        ),
        html.Section("Weights and their best levels", pictures=layers),
    ]
    if channels:
        text = [
            "One scale serves all channels of a layer, so channels much narrower than the widest get few levels."
        ]
        sections.append(html.Section("Channels of depthwise layers", text, pictures=channels))
    return sections


def _sizes(result: InspectResult) -> html.Table:
    sizes = [result.bytes, *(result.bytes_at[bits] for bits in TOTAL_BITS)]
    rows = [
        [f"{count(result.parameters)} parameters", *map(size, sizes)],
        ["of stored", *(f"{100 * part / max(result.bytes, 1):.1f}%" for part in sizes)],
    ]
    return html.Table(["all tensors", "stored", *(f"{bits} bits" for bits in TOTAL_BITS)], rows)


def _layer_table(result: InspectResult) -> html.Table:
    header = [
        "layer",
        "kind",
        "shape",
        "distribution",
        "tail",
        "parameters",
        "bytes",
        "min",
        "max",
        "std",
    ]
    header += [
        f"{bits}\N{NO-BREAK SPACE}bit {kind.replace('power_of_two', 'pow2')}"
        for bits in ERROR_BITS
        for kind in KINDS
    ]
    rows = [
        [
            row.name,
            row.kind,
            "×".join(map(str, row.shape)),
            row.distribution,
            f"{row.tail_weight:.2f}",
            f"{row.parameters:,}",
            f"{row.bytes:,}",
            *(f"{value:.3g}" for value in (row.min, row.max, row.std)),
            *(percent(row.error[bits][kind]) for bits in ERROR_BITS for kind in KINDS),
        ]
        for row in result.layers
    ]
    return html.Table(header, rows, text=4)
