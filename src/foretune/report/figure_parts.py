"""What all figures share: the figure itself, its labels and its colours."""

import colorsys
from dataclasses import dataclass, field
from html import escape
from typing import Any

from foretune.report.folder import Row

PALETTE = (
    "#3b7dd8", "#e07b1a", "#2a9d6f", "#d1495b", "#8b5fbf", "#a8752f", "#c95db0", "#4f8a9e", "#8f971b", "#6b6bd6",
)  # fmt: skip
TONES = {"good": "#2a9d6f", "warn": "#d98a00", "bad": "#d1495b", "mute": "#8a8f98"}
GREY = "#8a8f98"
LABEL_LENGTH = 30


@dataclass(frozen=True)
class Figure:
    """One figure: a plotly specification, what it shows in words, and data for its buttons.

    Attributes:
        name: Its id on the page.
        traces: Plotly traces.
        layout: Plotly layout, without colours.
        alt: What it shows, for readers who cannot see it.
        extra: What the page's script needs besides.
    """

    name: str
    traces: list[Row]
    layout: Row
    alt: str
    extra: Row = field(default_factory=dict)

    def spec(self) -> dict[str, Any]:
        """The JSON that the page embeds."""
        return {"name": self.name, "data": self.traces, "layout": self.layout, "extra": self.extra}


def short(name: str, length: int = LABEL_LENGTH) -> str:
    """A label that fits, with nothing in it that plotly reads as markup."""
    return escape(name if len(name) <= length else name[: length - 1] + "…", quote=False)


def colours(count: int) -> list[str]:
    """One colour per behaviour: a palette for few, for many a sweep of hues in the order of the ranks."""
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    made = []
    for i in range(count):
        red, green, blue = colorsys.hls_to_rgb(0.62 - 0.62 * i / (count - 1), 0.48, 0.62)
        made.append(f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}")
    return made
