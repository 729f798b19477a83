"""A mask as a picture: its slices as polygons, never its cells. Rows are queries, downwards; columns keys."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from lcab_plugin.masks import FULL, PARTIAL, AttentionMask, AttnSlice

_EXACT = 128  # tokens up to which the edge of a band is drawn cell by cell
_MOST = 4000  # polygons of a picture; beyond them blocks are drawn
_BLOCKS = 160  # rows and columns of blocks then

Point = tuple[float, float]  # key, query


def polygon(piece: AttnSlice) -> list[Point]:
    """The corners of a slice as (key, query) edges: its rectangle cut by the lines of its band.

    A line passes through the middle of the staircase that its cells make, half a token outside the last
    visible diagonal, so that the area is that of the cells but for an eighth of a cell at each end.
    """
    q0, q1, k0, k1, lo, hi = piece
    corners: list[Point] = [(k0, q0), (k1, q0), (k1, q1), (k0, q1)]
    if hi is not None:
        corners = _cut(corners, hi + 0.5, 1)
    if lo is not None:
        corners = _cut(corners, lo - 0.5, -1)
    return corners


def _cut(corners: list[Point], limit: float, side: int) -> list[Point]:
    """The part of a convex polygon where side * (key - query) <= side * limit."""

    def over(point: Point) -> float:
        return side * (point[0] - point[1] - limit)

    kept: list[Point] = []
    for a, b in zip(corners, [*corners[1:], corners[0]], strict=True):
        if over(a) <= 0:
            kept.append(a)
        if over(a) * over(b) < 0:
            t = over(a) / (over(a) - over(b))
            kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
    return kept


def staircase(piece: AttnSlice) -> list[Point]:
    """The outline of a slice's cells, exactly."""
    right: list[Point] = []
    left: list[Point] = []
    for q in range(piece.q_start, piece.q_end):
        start = piece.k_start if piece.lo is None else max(piece.k_start, q + piece.lo)
        stop = piece.k_end if piece.hi is None else min(piece.k_end, q + piece.hi + 1)
        right += [(stop, q), (stop, q + 1)]
        left += [(start, q), (start, q + 1)]
    return [*right, *reversed(left)]


def svg(mask: AttentionMask, size: int = 240, *, words: str, standalone: bool = False) -> str:
    """The picture, ``size`` pixels at its longer side. ``words``: what it shows, for who cannot see it.

    ``standalone``: as a file of its own, with its colours; otherwise they are the page's.
    """
    scale = size / max(mask.q_len, mask.k_len, 1)
    width, height = mask.k_len * scale, mask.q_len * scale
    if len(mask.array) <= _MOST:
        paths = [("seen", _path(_outlines(mask), scale))]
    else:
        paths = [
            (name, _path(_blocks(mask, kind), scale)) for name, kind in (("seen", FULL), ("some", PARTIAL))
        ]
    style = _STYLE if standalone else ""
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    drawn = "".join(f'<path class="{name}" d="{data}"/>' for name, data in paths if data)
    outer = f"{width + 2:.5g} {height + 2:.5g}"
    w, h = f"{width:.5g}", f"{height:.5g}"
    return (
        f'<svg{namespace} class="mask" viewBox="-1 -1 {outer}" width="{width + 2:.5g}" '
        f'height="{height + 2:.5g}" role="img" aria-label="{escape(words)}">{style}'
        f'<rect class="ground" width="{w}" height="{h}"/>{drawn}'
        f'<rect class="frame" width="{w}" height="{h}"/></svg>'
    )


def in_blocks(mask: AttentionMask) -> int | None:
    """Tokens of a block where a mask of very many slices is drawn in blocks; None where it is not."""
    return None if len(mask.array) <= _MOST else _block(mask)


def _block(mask: AttentionMask) -> int:
    return -(-max(mask.q_len, mask.k_len) // _BLOCKS)


def _outlines(mask: AttentionMask) -> Iterator[list[Point]]:
    outline = staircase if max(mask.q_len, mask.k_len) <= _EXACT else polygon
    return map(outline, mask.slices)


def _blocks(mask: AttentionMask, kind: int) -> Iterator[list[Point]]:
    """Runs of blocks of a kind in each row."""
    b = _block(mask)
    for i, row in enumerate(mask.block_map(b, b).to_dense().tolist()):
        begin = 0
        for j in range(1, len(row) + 1):
            if j < len(row) and row[j] == row[begin]:
                continue
            if row[begin] == kind:
                right, bottom = min(j * b, mask.k_len), min((i + 1) * b, mask.q_len)
                yield [(begin * b, i * b), (right, i * b), (right, bottom), (begin * b, bottom)]
            begin = j


def _path(outlines: Iterator[list[Point]], scale: float) -> str:
    """One path: inside one path the shared edge of two polygons leaves no seam."""
    return "".join(
        "M" + "L".join(f"{x * scale:.6g} {y * scale:.6g}" for x, y in outline) + "Z" for outline in outlines
    )


_STYLE = (
    "<style>.ground{fill:#f4f4f2}.seen{fill:#0072b2}.some{fill:#7fb3d5}.frame{fill:none;stroke:#888}"
    "@media(prefers-color-scheme:dark){.ground{fill:#24262b}.seen{fill:#56b4e9}.some{fill:#33627c}}</style>"
)
