"""Axes, ticks and marks of the charts."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from lcab_plugin.report import svg
from lcab_plugin.report.style import CSS


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, 0), (0, 0.013, 0), (3.2, 3.3, 0), (1e-9, 1e-5, 10), (1, 1e6, 2), (2, 3, 10)],
)
def test_ticks_are_inside_ascending_and_told_apart(low, high, log):
    places = svg.ticks(low, high, log)
    assert 2 <= len(places) <= 8
    assert places == sorted(set(places))
    assert low <= places[0] + 1e-12
    assert places[-1] <= high * (1 + 1e-9)
    assert len(set(svg.labels(places))) == len(places)


@pytest.mark.parametrize(
    ("n", "text"), [(16384, "16K"), (12345, "12345"), (1 << 20, "1M"), (3 << 19, "1536K"), (512, "512")]
)
def test_lengths_are_short_and_exact(n, text):
    assert svg.tokens(n) == text


@pytest.mark.parametrize(
    ("x", "text"), [(0, "0"), (0.0469, "0.0469"), (2.2e-7, "2.2e-7"), (14892.0, "14892")]
)
def test_numbers_are_short(x, text):
    assert svg.number(x) == text


def test_values_without_a_place_on_the_axis_are_left_out():
    series = svg.Series("a", [1, 2, 3, 4], [0.0, 1e-7, math.nan, 1e-6], 0)
    chart = svg.Chart("t", svg.Axis("x"), svg.Axis("y", log=10), [series])
    drawn = ElementTree.fromstring(svg.line_chart(chart))
    assert len(drawn.findall("circle")) == 2
    assert "nan" not in svg.line_chart(chart)


def test_series_stay_apart_without_colour():
    looks = {re.sub(r'class="[^"]*"', "", svg.swatch(i)) for i in range(24)}
    assert len(looks) == 24


def luminance(colour: str) -> float:
    """Relative, by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_stand_out_from_their_ground(theme):
    block = re.findall(r":root\{(.*?)\}", CSS, re.S)[theme]
    colours = {name: c if len(c) == 7 else "#" + "".join(2 * x for x in c[1:]) for name, c in
               re.findall(r"--([\w]+):(#[0-9a-f]{3,6})", block)}  # fmt: skip
    ground = luminance(colours["ground"])

    def contrast(name: str) -> float:
        pair = sorted((luminance(colours[name]), ground))
        return (pair[1] + 0.05) / (pair[0] + 0.05)

    assert all(contrast(f"c{i}") >= 3 for i in range(svg.COLOURS))
    assert all(contrast(name) >= 4.5 for name in ("ink", "soft", "link", "good", "bad"))
