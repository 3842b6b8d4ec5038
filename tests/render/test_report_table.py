"""`ddq report` on a terminal, of 80 and 140 columns, and in a pipe."""

from __future__ import annotations

import io
import re

import pytest
from made_run import make_report, make_run
from rich.console import Console

from ddqcli.formatting import percent
from ddqcli.render import sweep
from ddqcli.render.layer_table import bar
from ddqcli.render.report import show, size_line
from ddqcli.runs.report import Report, SweepRow, SweepTable

NAMES = [f"features.denseblock{k // 6 + 1}.denselayer{k % 6 + 1}.conv1.weight" for k in range(12)]
ESCAPE = re.compile("\x1b\\[[0-9;]*m")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_run(tmp_path_factory.mktemp("made") / "run", names=NAMES).report()


def shown(
    report: Report, width: int, *, terminal: bool = True, encoding: str = "utf-8", **kwargs: object
) -> str:
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=buffer, width=width, force_terminal=terminal, legacy_windows=False, **kwargs
    )
    show(report, console)
    buffer.flush()
    return buffer.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 140])
def test_each_tensor_has_one_line_with_bars_that_fits(report: Report, width: int) -> None:
    """The bar of bits has a character a bit, that of bytes ten for the largest tensor."""
    lines = ESCAPE.sub("", shown(report, width)).splitlines()
    assert max(map(len, lines)) <= width
    rows = lines[2 : 2 + len(report.layers)]
    assert len({line.split()[0] for line in rows}) == len(report.layers)
    largest = max(row.bytes for row in report.layers)
    for line, row in zip(rows, report.layers, strict=True):
        bars = re.findall("[━╸]+", line)
        assert bars[0] == "━" * round(row.bits)
        length = sum(1 if part == "━" else 0.5 for part in bars[1])
        assert length == pytest.approx(10 * row.bytes / largest, abs=0.251)
        assert f"{row.bytes:,}" in line.split()
        assert line.rstrip().endswith(f" {percent(row.error)}%")


@pytest.mark.parametrize("nbytes", [64, 123_456_789])
@pytest.mark.parametrize(
    "name", ["fc.weight", "stem.0.weight", "encoder.1.weight", "features.0.block.1.0.weight"]
)
@pytest.mark.parametrize("width", [60, 72, 76, 80, 81, 90, 100, 140])
def test_no_column_is_cut(name: str, width: int, nbytes: int) -> None:
    """The last column stands whole beside short names, long ones and the file's other parts."""
    made = make_report()
    rows = [made.layers[0].model_copy(update={"name": name, "bytes": nbytes})]
    totals = made.totals.model_copy(update={"bytes": 2 * nbytes, "manifest_bytes": 1234})
    made = made.model_copy(update={"layers": tuple(rows), "totals": totals})
    lines = ESCAPE.sub("", shown(made, width)).splitlines()
    assert lines[0].split()[-1] == "error"
    assert lines[2].rstrip().endswith(f" {percent(rows[0].error)}%")
    assert lines[4].startswith("manifest, header ")
    assert lines[2].split()[0] == name or len(name) > 16
    cells = [f"{rows[0].bits:g}", f"{nbytes:,}", "50.0%"]
    assert set(cells) <= set(lines[2].split())


@pytest.mark.parametrize("target", ["3 bits", "123456 bytes"])
def test_no_column_of_a_sweep_is_cut(target: str) -> None:
    made = make_report()
    run = target.replace(" ", "-")
    rows = [SweepRow.of(target, made, run)]
    buffer = io.StringIO()
    console = Console(file=buffer, width=80, force_terminal=True, no_color=True)
    sweep.show(SweepTable.of(made, rows), console)
    lines = ESCAPE.sub("", buffer.getvalue()).splitlines()
    assert lines[0].split()[-2:] == ["drop", "run"]
    assert lines[2].startswith(f"{target} ")
    assert lines[2].rstrip().endswith(f" {run}")
    assert ("━" in lines[2]) == (target == "3 bits")


def test_names_are_the_same_on_a_terminal_and_in_a_pipe() -> None:
    terminal, pipe = (shown(make_report(), 80, terminal=each) for each in (True, False))
    assert ESCAPE.sub("", terminal).splitlines()[2].split()[0] == "conv.weight"
    assert pipe.splitlines()[1].split()[0] == "conv.weight"


def test_a_wide_terminal_shows_kind_and_shape_too(report: Report) -> None:
    narrow, wide = (ESCAPE.sub("", shown(report, width)).splitlines() for width in (80, 140))
    assert narrow[0].split() == ["layer", "bits", "levels", "bytes", "share", "error"]
    assert wide[0].split() == ["layer", "kind", "shape", *narrow[0].split()[1:]]
    assert "depthwise 6×5×3×3" in wide[3]


def test_a_pipe_gets_no_bar_no_color_no_rule_and_whole_names(report: Report) -> None:
    text = shown(report, 160, terminal=False)
    assert not re.search("[\x1b━╸─]", text)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(NAMES)]] == NAMES
    assert f"warning    {report.warnings[0]}" in lines


def test_a_terminal_without_unicode_gets_ascii(report: Report) -> None:
    assert ESCAPE.sub("", shown(report, 80, encoding="ascii")).isascii()


def test_no_color_leaves_the_bars(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    colors = re.compile("\x1b\\[(?:[0-9]+;)*(?:3[0-7]|9[0-7]|38;)")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colors.search(shown(report, 80))
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(report, 80)
    assert not colors.search(text)
    assert "━" in text


def test_a_long_warning_is_wrapped_beside_its_label() -> None:
    words = [f"word{k}" for k in range(40)]
    report = make_report().model_copy(update={"warnings": (" ".join(words),)})
    lines = ESCAPE.sub("", shown(report, 80)).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("warning    "))
    assert len(lines) - start > 2
    assert {line[:11].strip() for line in lines[start + 1 :]} == {""}
    assert " ".join(line[11:].strip() for line in lines[start:]).split() == words
    piped = shown(report, 80, terminal=False).splitlines()
    assert piped[-1] == "warning    " + " ".join(words)


@pytest.mark.parametrize(
    ("share", "drawn"),
    [
        (0, ""),
        (0.04, "╸"),
        (0.5, "━━━━━"),
        (0.56, "━━━━━╸"),
        (1, "━" * 10),
        (1.7, "━" * 10),
        (-1, ""),
    ],
)
def test_a_bar_rounds_to_half_a_character(share: float, drawn: str) -> None:
    assert bar(share, 10) == drawn


@pytest.mark.parametrize(
    ("float_bytes", "nbytes", "change"),
    [(1000, 250, "4.0x smaller"), (1000, 1000, "1.0x smaller"), (1000, 1500, "1.5x larger")],
)
def test_a_file_that_grew_is_not_called_smaller(float_bytes: int, nbytes: int, change: str) -> None:
    assert size_line(float_bytes, nbytes).endswith(f"({change})")
