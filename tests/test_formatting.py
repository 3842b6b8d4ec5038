"""Numbers and names as short text."""

from __future__ import annotations

import pytest

from ddqcli.formatting import count, duration, percent, shorten, size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *[(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (134_173, "134 kB"), (999_600, "1.00 MB")],
        *[(1.08e6, "1.08 MB"), (99_950_000, "100 MB"), (2.5e9, "2.50 GB")],
    ],
)
def test_sizes_have_three_digits(number, text):
    assert size(number) == text


def test_durations_are_clock_times():
    assert [duration(s) for s in (0.4, 59.6, 65, 3600, 86_399)] == [
        *("0:00", "1:00", "1:05", "1:00:00", "23:59:59")
    ]


def test_counts_have_three_digits():
    assert [count(n) for n in (1, 864, 2304, 36_864, 1_280_000, 7e9)] == [
        *("1", "864", "2.30k", "36.9k", "1.28M", "7.00G")
    ]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        *[(0, "0"), (1, "100"), (0.1234, "12"), (0.0994, "9.9"), (0.0995, "10"), (0.0123, "1.2")],
        *[(0.00941, "0.94"), (0.000412, "0.041"), (0.00004, "0.004"), (1e-7, "<.001")],
    ],
)
def test_percentages_fit_five_characters(share, text):
    assert percent(share) == text
    assert len(text) <= 5


def test_a_name_that_fits_is_unchanged():
    assert shorten("layer1.0.conv1", 14) == "layer1.0.conv1"


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        ("features.denseblock1.denselayer10.conv1", 33, "featur….denseb…1.densel…10.conv1"),
        ("features.denseblock1.denselayer10.conv1", 22, "fe….de…1.de…10.conv1"),
        ("encoder.layer.11.attention.self.query", 26, "en….la….11.at….se….query"),
    ],
)
def test_a_long_name_keeps_its_numbers(name, width, short):
    assert shorten(name, width) == short


@pytest.mark.parametrize("name", ["x" * 100, "a.b.c.d.e.f.g.h.i.j.k.l.m.n", "weight." + "y" * 60])
@pytest.mark.parametrize("width", [8, 13, 22])
def test_any_name_is_cut_to_fit(name, width):
    short = shorten(name, width)
    assert len(short) <= width
    assert "…" in short
