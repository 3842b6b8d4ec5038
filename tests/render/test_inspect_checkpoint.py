"""The table of `ddq inspect` at several widths, on a terminal and in a pipe."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from ddqcli.inspection.checkpoint_rows import CheckpointResult, CheckpointRow
from ddqcli.render.inspect_checkpoint import show
from ddqcli.render.layer_table import spark

NAMES = [f"features.denseblock{k // 6 + 1}.denselayer{k % 6 + 1}.conv1.weight" for k in range(12)]


def row(name: str, word: str = "heavy-tailed") -> CheckpointRow:
    error = {
        bits: {"uniform": 0.5 / bits, "power_of_two": 0.4 / bits, "best": 0.1 / 4**bits}
        for bits in (2, 3, 4, 8)
    }
    return CheckpointRow(
        name=name,
        kind="depthwise",
        shape=(32, 1, 3, 3),
        dtype="float32",
        parameters=288,
        bytes=1152,
        min=-1.5,
        max=2.25,
        mean=0.001,
        std=0.125,
        tail_weight=2.5,
        distribution=word,
        error=error,
        histogram=(1, *[0] * 63, 100, *[5] * 63),
        levels=(0.0,) * 16,
    )


def result(names: list[str] = NAMES, **kwargs: object) -> CheckpointResult:
    layers = tuple(row(name) for name in names)
    rest = {"tensors": 4, "parameters": 99, "bytes": 396}
    return CheckpointResult(
        Path("net.pt"),
        "state dict",
        layers,
        rest,
        kwargs.pop("tied", {}),
        dict.fromkeys((8, 6, 4, 3, 2), 5000),
        **kwargs,
    )


def shown(
    width: int,
    found: CheckpointResult | None = None,
    *,
    terminal: bool = False,
    encoding: str = "utf-8",
) -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=buffer, width=width, force_terminal=terminal, no_color=True, legacy_windows=False
    )
    show(found or result(), console)
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [80, 100, 120, 160, 200])
def test_each_layer_has_one_line_that_fits(width, terminal):
    lines = (
        shown(width, terminal=terminal).replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    )
    rows = [line for line in lines if "depthwise" in line]
    assert len(rows) == len(NAMES)
    assert all(len(line) <= width for line in rows)
    assert len({line.split()[0] for line in rows}) == len(NAMES)  # shortened names still differ


def test_80_columns_show_the_4_bit_errors_and_say_there_is_more():
    text = shown(80)
    assert "heavy-tailed" in text
    assert "12    10 0.039" in " ".join(text.split("heavy-tailed")[1].split("\n")[0:1])
    assert "3 bit" not in text.replace("3 bits", "")
    assert "--json all" in " ".join(text.split())


def test_a_wide_console_shows_every_column():
    text = shown(210)
    header = text[: text.index(NAMES[0].removesuffix(".weight"))]
    for word in (
        "kind",
        "shape",
        "params",
        "bytes",
        "min",
        "max",
        "std",
        "histogram",
        "distribution",
        "tail",
    ):
        assert word in header
    for bits in (2, 3, 4, 8):
        assert header.count(f"{bits} bit") == 3
    assert "wider terminal" not in text
    assert NAMES[-1].removesuffix(".weight") in text


def test_a_pipe_gets_no_lines_and_no_color():
    text = shown(80)
    assert "─" not in text
    assert "\x1b" not in text


def test_a_console_without_unicode_gets_ascii():
    text = shown(80, encoding="ascii")
    assert text.isascii()
    assert "~" in text


def test_totals_tied_tensors_pictures_and_the_next_step_are_told():
    text = shown(
        120,
        result(
            tied={"head": "embed", "x": "y"}, pictures=(Path("out/index.html"), Path("out/a.png"))
        ),
    )
    flat = " ".join(text.split())
    assert " 5,000 " in flat
    assert "the rest 4 biases, norms and counters (99 values, 396 bytes) stay as stored" in flat
    assert "head is the same memory as embed, and 1 more; counted once" in flat
    assert "out/index.html shows them all (2 files)" in flat
    assert "ddq finetune net.pt --arch net.py:build --data FOLDER --target-bits 4" in flat


def test_names_like_markup_are_shown_as_they_are():
    assert "[bold]x[/bold]" in shown(120, result(["[bold]x[/bold].weight"]))


def test_a_checkpoint_without_layers_shows_its_totals():
    assert "all tensors" in shown(80, result([]))


def test_sparks_scale_to_the_highest_and_keep_single_values_visible():
    assert spark((0, 0, 1, 0, 400, 800, 0, 0), 4) == " ▁█ "
    assert spark((0,) * 8, 4) == "    "
