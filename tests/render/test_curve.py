"""A curve in plain characters."""

from __future__ import annotations

import pytest

from ddqcli.render.curve import curve_lines

TICKS = ("99%", "90%", "100", "10,000")


def places(lines: list[str], labels: str) -> dict[str, tuple[int, int]]:
    """Return row and column of the mark before each label."""
    found = {}
    for label in labels:
        (row,) = (k for k, line in enumerate(lines) if f"o {label}" in line)
        found[label] = row, lines[row].index(f"o {label}")
    return found


def test_larger_files_stand_further_right_and_larger_values_higher() -> None:
    points = [(1000.0, 98.0, "b"), (100.0, 90.0, "a"), (10_000.0, 99.0, "c")]
    lines = curve_lines(points, 99.0, TICKS)
    at = places(lines, "abc")
    assert [at[label][0] for label in "abc"] == [9, 1, 0]
    left, middle, right = (at[label][1] for label in "abc")
    assert middle - left == right - middle > 10  # 1000 is halfway in a logarithmic scale
    assert lines[0].startswith("99% |")
    assert lines[9].startswith("90% |")
    assert lines[0].count("- ") > 10
    assert lines[-1].split() == ["100", "10,000"]
    assert lines[-1].index("100") == left
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "points", [[(5.0, 1.0, "a")], [(5.0, 1.0, "a"), (7.0, 1.0, "b")], [(5.0, 0.5, "a")]]
)
def test_one_point_or_one_value_is_a_curve_too(points: list[tuple[float, float, str]]) -> None:
    lines = curve_lines(points, 1.0, ("1", "1", "5", "7"))
    assert all(f"o {label}" in "".join(lines) for _, _, label in points)


def test_a_point_at_the_right_end_keeps_its_label_within_80_columns() -> None:
    points = [(5.0, 1.0, "a"), (7.0, 1.0, "a label of many words")]
    lines = curve_lines(points, 1.0, ("1", "1", "5", "7"))
    assert max(map(len, lines)) <= 80
    assert "o a label" in "".join(lines)
