"""What a page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from lcab_plugin.report.tables import Table


@dataclass(frozen=True)
class Heading:
    """Of a part of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Figure:
    """Charts, in the page only: their numbers are in the tables. ``caption``: how to read them."""

    html: str
    caption: str = ""


Block = Heading | Text | Figure | Table


@dataclass
class Section:
    """``slug``: its place in the page."""

    slug: str
    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        return [block for block in self.blocks if isinstance(block, Table)]

    def figure(self, html: str, caption: str = "") -> None:
        """Add charts, if there are any."""
        if html:
            self.blocks.append(Figure(html, caption))

    def html(self) -> str:
        parts = "".join(map(_html, self.blocks))
        return (
            f'<section id="{self.slug}" aria-labelledby="{self.slug}-title">'
            f'<h2 id="{self.slug}-title">{escape(self.title)}</h2>{parts}</section>'
        )

    def markdown(self) -> str:
        texts: Sequence[str] = [_markdown(block) for block in self.blocks]
        return "\n\n".join([f"## {self.title}", *(text for text in texts if text)])


def _html(block: Block) -> str:
    if isinstance(block, Table):
        return block.html()
    if isinstance(block, Heading):
        return f"<h3>{escape(block.text)}</h3>"
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    caption = f'<p class="caption">{escape(block.caption)}</p>' if block.caption else ""
    return caption + block.html


def _markdown(block: Block) -> str:
    if isinstance(block, Table):
        return block.markdown()
    if isinstance(block, Heading):
        return f"### {block.text}"
    return block.text if isinstance(block, Text) else ""
