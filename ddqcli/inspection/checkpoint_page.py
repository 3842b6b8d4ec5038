"""The page of `ddq inspect` for a checkpoint, with its figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ddqcli import plots
from ddqcli.formatting import count, percent, size
from ddqcli.inspection import html
from ddqcli.inspection.checkpoint_rows import (
    ERROR_BITS,
    LEVEL_BITS,
    TOTAL_BITS,
    CheckpointResult,
    CheckpointRow,
    Progress,
)
from ddqcli.inspection.distribution import FLAT, HEAVY
from ddqcli.inspection.layer_figures import PAGE, LayerElements, draw_layers, output_folder

KINDS = ("uniform", "power_of_two", "best")


def write_checkpoint_page(
    result: CheckpointResult, out: Path, on_progress: Progress | None = None
) -> tuple[Path, ...]:
    """Write PNG and SVG files and the page into `out`; return their paths, the page first.

    Raises DDQError if the folder cannot be written to.
    """
    with output_folder(out) as folder:
        layers = [_layer(row) for row in result.layers]
        channels = {
            k: np.array(row.channels) for k, row in enumerate(result.layers) if row.channels
        }
        elements = draw_layers(layers, channels, folder, on_progress)
        title = f"Weights of {result.path.name}"
        page = html.write_html(out / PAGE, title, _sections(result, elements))
    return page, *folder.files


def _layer(row: CheckpointRow) -> plots.Layer:
    levels = f"best {len(row.levels)} levels ({LEVEL_BITS} bits, Lloyd-Max)"
    return plots.Layer(
        row.name, row.kind, row.distribution, row.min, row.max, row.histogram, row.levels, levels
    )


def _sections(result: CheckpointResult, elements: LayerElements) -> list[html.Section]:
    sections = [
        _size_section(result),
        _layer_section(result),
        html.Section("Weights and their best levels", pictures=elements.layers),
    ]
    if elements.channels:
        text = [
            "All channels of a layer share one scale, so channels much narrower than the widest "
            "get few levels."
        ]
        sections.append(
            html.Section("Channels of depthwise layers", text, pictures=elements.channels)
        )
    return sections


def _size_section(result: CheckpointResult) -> html.Section:
    rest = result.rest
    text = [
        f"{result.path}: {result.note}.",
        f"Biases, norms and counters ({rest['tensors']} tensors, {size(rest['bytes'])}) stay as "
        "stored and are counted in every size.",
    ]
    sizes = [result.bytes, *(result.bytes_at[bits] for bits in TOTAL_BITS)]
    rows = [
        [f"{count(result.parameters)} parameters", *map(size, sizes)],
        ["of stored", *(f"{100 * part / max(result.bytes, 1):.1f}%" for part in sizes)],
    ]
    header = ["all tensors", "stored", *(f"{bits} bits" for bits in TOTAL_BITS)]
    return html.Section("Size", text, html.Table(header, rows))


def _layer_section(result: CheckpointResult) -> html.Section:
    text = [
        "Error: sum of squared differences after quantization over the sum of squares, in percent, "
        "with uniform, power-of-two and best (Lloyd-Max) levels at 2, 3, 4 and 8 bits.",
        "Tail: range of the central 99 % of the weights over that of the central half, relative to "
        f"a Gaussian. Heavy-tailed from {HEAVY}, flat up to {FLAT}, multi-peaked if the smoothed "
        "density dips between two peaks.",
    ]
    return html.Section("Layers", text, _layer_table(result))


def _layer_table(result: CheckpointResult) -> html.Table:
    header = ["layer", "kind", "shape", "distribution", "tail", "parameters", "bytes"]
    header += ["min", "max", "std"]
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
