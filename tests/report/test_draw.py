"""Pictures of masks: the polygons have the area of the cells, and no cell is ever looked at."""

from __future__ import annotations

import re

import pytest

from lcab_plugin import masks
from lcab_plugin.bench.settings import default_parameters
from lcab_plugin.report import draw


def area(corners):
    """Of a polygon, by the shoelace formula."""
    pairs = zip(corners, [*corners[1:], corners[0]], strict=True)
    return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in pairs)) / 2


def family(name: str, n: int) -> masks.AttentionMask:
    return masks.from_name(name, n, **default_parameters(name, n))


@pytest.mark.parametrize("name", masks.names())
def test_a_staircase_has_exactly_the_cells(name):
    mask = family(name, 96)
    assert [area(draw.staircase(s)) for s in mask.slices] == [s.area for s in mask.slices]


@pytest.mark.parametrize("name", masks.names())
def test_a_polygon_is_inside_its_slice_and_within_half_a_cell_of_its_area(name):
    for piece in family(name, 5000).slices:
        corners = draw.polygon(piece)
        assert area(corners) == pytest.approx(piece.area, abs=0.5 + 1e-6)
        for k, q in corners:
            assert piece.k_start <= k <= piece.k_end
            assert piece.q_start <= q <= piece.q_end


def test_long_masks_are_drawn_small_and_quickly():
    mask = masks.causal_document([1024] * (1 << 14))
    picture = draw.svg(mask, words="many documents")
    assert draw.in_blocks(mask) == -(-(1 << 24) // 160)
    assert len(picture) < 100_000


def test_a_file_of_its_own_has_its_colours_and_says_what_it_shows():
    picture = draw.svg(masks.causal(64), 100, words="causal <64>", standalone=True)
    assert picture.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert 'aria-label="causal &lt;64&gt;"' in picture
    assert "prefers-color-scheme:dark" in picture


def test_a_wide_mask_keeps_its_proportions():
    mask = masks.AttentionMask(32, 128, [(0, 32, 0, 128)])
    width, height = re.search(
        r'width="([\d.]+)" height="([\d.]+)" role', draw.svg(mask, 128, words="")
    ).groups()
    assert (float(width), float(height)) == (130, 34)


def test_an_empty_mask_is_an_empty_frame():
    assert "<path" not in draw.svg(masks.AttentionMask(8, 8, []), words="")
