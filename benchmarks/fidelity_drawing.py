"""The figure of docs/fidelity.md: how well methods describe the end of the run, against what they cost."""

from collections.abc import Iterator
from math import log
from statistics import median
from typing import Any

COLOURS = {"twin": "#3b7dd8", "pilot": "#2a9d6f", "persistence": "#a8752f", "shorter": "#d1495b", "seed": "#8a8f98"}
KINDS = {"twin": "from step 0", "pilot": "from a pilot", "persistence": "the pilot's own losses"}
KINDS |= {"shorter": "shorter real runs", "seed": "another seed"}
LEFT, WIDTH, TOP, HEIGHT = 0.04, 400, 30, 290


def figure(methods: dict[str, list[dict[str, Any]]]) -> str:
    """Spearman and R² at the end against cost, one dot a run, and over the run."""
    panels = [("Spearman of the losses, end", "spearman_loss"), ("margin R², end", "margin_r2")]
    parts = [svg_open(940, 400)]
    for place, (title, key) in enumerate(panels):
        left = 60 + place * 460
        parts += axes(left, title)
        for name, found in methods.items():
            if (group := kind(name)) is None:
                continue
            values = [entry["end"][key] for entry in found if entry["end"].get(key) is not None]
            cost = median(entry["cost"] for entry in found)
            parts += dots(left, cost, values, COLOURS[group], name)
    for place, (group, words) in enumerate(KINDS.items()):
        x = 60 + place * 175
        parts.append(f'<circle cx="{x}" cy="384" r="5" fill="{COLOURS[group]}"/>')
        parts.append(f'<text x="{x + 10}" y="388">{words}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def across(left: float, cost: float) -> float:
    """Costs of 0.04 to 4, logarithmic."""
    return left + WIDTH * log(max(cost, LEFT) / LEFT) / log(100)


def down(value: float) -> float:
    """Values of 0 to 1."""
    return TOP + HEIGHT * (1 - max(0.0, min(1.0, value)))


def svg_open(width: int, height: int) -> str:
    """The drawing's head: readable in light and dark pages."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" fill="#444"><rect width="{width}" height="{height}" fill="#fff"/>'
    )


def axes(left: float, title: str) -> Iterator[str]:
    """A panel's frame, lines and labels."""
    yield f'<text x="{left}" y="18" font-weight="bold">{title}</text>'
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = down(value)
        yield f'<line x1="{left}" x2="{left + WIDTH}" y1="{y}" y2="{y}" stroke="#ddd"/>'
        yield f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:g}</text>'
    for cost in (0.05, 0.1, 0.2, 0.5, 1, 2, 4):
        x = across(left, cost)
        yield f'<line x1="{x}" x2="{x}" y1="{TOP + HEIGHT}" y2="{TOP + HEIGHT + 4}" stroke="#444"/>'
        yield f'<text x="{x}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{cost:g}</text>'
    yield f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">cost, in real runs</text>'


def dots(left: float, cost: float, values: list[float], colour: str, name: str) -> Iterator[str]:
    """A method's runs, and a ring at their median."""
    x = across(left, cost)
    for value in values:
        yield f'<circle cx="{x:.1f}" cy="{down(value):.1f}" r="3" fill="{colour}" fill-opacity="0.45"/>'
    if values:
        centre = median(values)
        yield (
            f'<circle cx="{x:.1f}" cy="{down(centre):.1f}" r="6" fill="none" stroke="{colour}" stroke-width="2">'
            f"<title>{name}: {centre:.2f} at {cost:.2f}</title></circle>"
        )


def kind(name: str) -> str | None:
    """Which colour; None: a baseline without margins."""
    if name == "real run, another seed":
        return "seed"
    return {"twin": "twin", "pilo": "pilot", "pers": "persistence", "real": "shorter"}.get(name[:4])
