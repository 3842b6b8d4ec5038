"""The closing words of `ddq export`: where the bytes went, and what was compared with what."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ddqcli.formatting import size

_PARTS = ("indices", "levels", "scales", "gates", "floats", "manifest", "header", "file")


def exported(data: dict[str, Any], console: Console) -> None:
    """What was written, or checked."""
    lines = _onnx(data) if data["format"] == "onnx" else _ddq(data)
    if data["format"] != "onnx":
        console.print(_parts(data["sizes"]))
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _parts(sizes: dict[str, int]) -> Table:
    grid = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("left", "right", "right"):
        grid.add_column(justify=justify)
    for part in _PARTS:
        share = f"{100 * sizes[part] / sizes['file']:.1f}%"
        grid.add_row(part, f"{sizes[part]:,}", share, style="bold" if part == "file" else "")
    return grid


def _ddq(data: dict[str, Any]) -> list[str]:
    verified, behaviour = data["verified"], data["behaviour"]
    rounded = ", what stays float rounded to float16," if data["half"] else ""
    lines = [
        f"{data['path']}: {size(data['float_bytes'])} -> {size(data['sizes']['file'])}",
        f"bits       all {verified['values']:,} values of {verified['tensors']} tensors{rounded} read back as trained",
    ]
    if (outputs := behaviour["outputs"]) is not None:
        same = (
            "the same bits as the trained network's"
            if outputs == 0
            else f"{outputs:.1e} from the trained network's"
        )
        lines.append(f"outputs    {same}")
    if (accuracy := behaviour["accuracy"]) is not None and behaviour["expected"] is not None:
        change = accuracy - behaviour["expected"]
        said = "as reported" if abs(change) < 1e-4 else f"{change:+.4f} points from the report's"
        lines.append(f"accuracy   {accuracy:.2f}%, {said}")
    return lines + [f"unchecked  {reason}" for reason in behaviour["unchecked"]]


def _onnx(data: dict[str, Any]) -> list[str]:
    lines = [f"{data['path']}: {size(data['float_bytes'])} -> {size(data['sizes']['file'])}"]
    for key, words in (("optimised", "onnxruntime"), ("unoptimised", "without optimisations")):
        found = data[key]
        text = (
            f"{words}: outputs {found['outputs']:.1e} from torch's on {found['samples']:,} samples"
        )
        if found["accuracy"] is not None:
            text += f", accuracy {found['accuracy']:.2f}% (torch {found['torch_accuracy']:.2f}%)"
        lines.append(text)
    return lines + [f"unchecked  {reason}" for reason in data["unchecked"]]
