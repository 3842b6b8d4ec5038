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
from ddqcli.inspection.layer_figures import PAGE, LayerPictures, draw_layers, figure_folder

KINDS = ("uniform", "power_of_two", "best")
HEADERS = {"uniform": "unif", "power_of_two": "pow2"}
HEAD_BITS = (8, 4, 3, 2)  # whose sizes stand at the top


def write_checkpoint_page(
    result: CheckpointResult, out: Path, on_progress: Progress | None = None
) -> tuple[Path, ...]:
    """Write PNG and SVG files and the page into `out`; return their paths, the page first.

    Raises DDQError if the folder cannot be written to.
    """
    with figure_folder(out) as folder:
        layers = [_layer(row) for row in result.layers]
        channels = {
            k: np.array(row.channels) for k, row in enumerate(result.layers) if row.channels
        }
        pictures = draw_layers(layers, channels, folder, on_progress)
        title = f"Weights of {result.path.name}"
        page = html.write_html(out / PAGE, title, _sections(result, pictures))
    return page, *folder.files


def _layer(row: CheckpointRow) -> plots.Layer:
    levels = f"best {len(row.levels)} levels ({LEVEL_BITS} bits, Lloyd-Max)"
    return plots.Layer(
        row.name, row.kind, row.distribution, row.min, row.max, row.histogram, row.levels, levels
    )


def _sections(result: CheckpointResult, pictures: LayerPictures) -> list[html.Section]:
    text = [
        "Bars: weights, colored by the shape of their distribution. Lines: the levels that fit "
        f"them best at {LEVEL_BITS} bits."
    ]
    sections = [
        _head_section(result),
        _layer_section(result),
        html.Section("Weights and their best levels", text, pictures=pictures.layers),
    ]
    if pictures.channels:
        text = [
            "All channels of a layer share one scale, so channels much narrower than the widest "
            "get few levels."
        ]
        sections.append(
            html.Section("Channels of depthwise layers", text, pictures=pictures.channels)
        )
    return [*sections, _size_section(result)]


def _head_section(result: CheckpointResult) -> html.Section:
    note = f"{len(result.layers)} layers, {count(result.parameters)} parameters"
    facts = [html.Fact("Size as stored", size(result.bytes), note)]
    for bits in HEAD_BITS:
        nbytes = result.bytes_at[bits]
        note = f"{100 * nbytes / max(result.bytes, 1):.1f} % of stored"
        facts.append(html.Fact(f"With weights of {bits} bits", size(nbytes), note))
    return html.Section("", [f"{result.path}: {result.note}."], facts=facts)


def _size_section(result: CheckpointResult) -> html.Section:
    rest = result.rest
    text = [
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
    header = ["layer", "kind", "shape", "distribution", "tail", "parameters", "std"]
    header += [
        f"{bits}\N{NO-BREAK SPACE}bit {HEADERS.get(kind, kind)}"
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
            f"{row.std:.2g}",
            *(percent(row.error[bits][kind]) for bits in ERROR_BITS for kind in KINDS),
        ]
        for row in result.layers
    ]
    return html.Table(header, rows, text=4)
