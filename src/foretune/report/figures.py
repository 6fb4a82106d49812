"""The figures, as plotly specifications (plain JSON); the page's own script draws them in light or dark colours."""

from foretune.report.figure_curves import agreement_figure, curves_figure
from foretune.report.figure_parts import GREY, TONES, Figure, short
from foretune.report.folder import Row, RunFolder, curve
from foretune.report.verdicts import BehaviourVerdict

FEW = 14


def figures(folder: RunFolder, verdicts: list[BehaviourVerdict]) -> dict[str, Figure]:
    """All figures that this run folder has the data for, by name."""
    made = [
        curves_figure(folder, verdicts),
        scatter_figure(verdicts),
        agreement_figure(folder),
        kernel_figure(folder, verdicts),
        displacement_figure(folder, verdicts),
    ]
    return {figure.name: figure for figure in made if figure is not None}


def scatter_figure(verdicts: list[BehaviourVerdict]) -> Figure | None:
    """Final losses, forecast against observed, with the diagonal."""
    losses = {
        item.behaviour: (item.forecast.final_loss, item.observed.final_loss)
        for item in verdicts
        if item.forecast and item.observed
    }
    both = [item for item in verdicts if item.behaviour in losses]
    if not both:
        return None
    x, y = map(list, zip(*(losses[item.behaviour] for item in both), strict=True))
    low, high = min(x + y), max(x + y)
    pad = 0.08 * (high - low) or 0.05
    ends = [low - pad, high + pad]
    diagonal = {"type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip", "showlegend": False}
    diagonal["line"] = {"color": GREY, "width": 1, "dash": "dot"}
    points = {
        "type": "scatter",
        "mode": "markers+text" if len(both) <= FEW else "markers",
        "x": x,
        "y": y,
        "text": [short(item.behaviour, 24) for item in both],
        "textposition": "top center",
        "textfont": {"size": 10},
        "cliponaxis": False,
        "customdata": [f"{short(item.behaviour, 70)}<br>{item.verdict}" for item in both],
        "hovertemplate": "%{customdata}<br>forecast %{x:.3f}, observed %{y:.3f}<extra></extra>",
        "marker": {"size": 10, "color": [TONES[item.tone] for item in both], "line": {"width": 1, "color": "#fff"}},
        "showlegend": False,
    }
    layout = {
        "height": 440,
        "margin": {"l": 56, "r": 16, "t": 12, "b": 44},
        "xaxis": {"title": {"text": "forecast final loss"}, "range": ends, "zeroline": False},
        "yaxis": {"title": {"text": "observed final loss"}, "range": ends, "zeroline": False},
    }
    worst = max(both, key=lambda item: abs(losses[item.behaviour][0] - losses[item.behaviour][1]))
    alt = f"Scatter of {len(both)} behaviours around the diagonal; the furthest from it is {worst.behaviour}."
    return Figure("scatter", [diagonal, points], layout, alt)


def kernel_figure(folder: RunFolder, verdicts: list[BehaviourVerdict]) -> Figure | None:
    """The behaviour kernel as cosines, sorted by priority."""
    kernel = folder.audit.get("kernel") or {}
    names, matrix = kernel.get("behaviours") or [], kernel.get("matrix") or []
    if len(names) < 2 or len(matrix) != len(names):
        return None
    order = _by_priority(names, verdicts)
    cosine = [[_cosine(matrix, i, j) for j in order] for i in order]
    labels = [names[i] for i in order]
    count = len(labels)
    numbers = list(range(1, count + 1))
    text = [[f"{short(a, 60)}<br>and {short(b, 60)}" for b in labels] for a in labels]
    trace = {
        "type": "heatmap",
        "x": numbers,
        "y": numbers,
        "z": cosine,
        "zmin": -1,
        "zmax": 1,
        "text": text,
        "hovertemplate": "%{text}: %{z:.2f}<extra></extra>",
        "xgap": 1 if count <= 30 else 0,
        "ygap": 1 if count <= 30 else 0,
        "colorbar": {"thickness": 10, "len": 0.6, "tickvals": [-1, 0, 1], "ticktext": ["hurts", "0", "helps"]},
    }
    ticks = [f"{short(name, 26)} {i}" for i, name in zip(numbers, labels, strict=True)]
    every = max(1, round(count / 12))
    layout = {
        "height": 130 + max(22 * count, 120) if count <= 30 else 130 + 15 * count,
        "margin": {"l": 190, "r": 8, "t": 12, "b": 36},
        "xaxis": {"tickvals": numbers[::every], "ticktext": [str(i) for i in numbers[::every]], "showgrid": False},
        "yaxis": {"tickvals": numbers, "ticktext": ticks, "autorange": "reversed", "showgrid": False},
    }
    layout["yaxis"]["tickfont"] = {"size": 11 if count <= 30 else 9}
    extra = {"narrow_ticks": [f"{short(name, 13)} {i}" for i, name in zip(numbers, labels, strict=True)]}
    hurting = sum(value is not None and value < 0 for i, row in enumerate(cosine) for value in row[:i])
    alt = f"Heat map of {count} behaviours: {hurting} of {count * (count - 1) // 2} couples hurt each other."
    return Figure("kernel", [trace], layout, alt, extra)


def _by_priority(names: list[str], verdicts: list[BehaviourVerdict]) -> list[int]:
    priority = {item.behaviour: item.measures.get("priority") for item in verdicts}
    known = {name: value for name, value in priority.items() if value is not None}
    return sorted(range(len(names)), key=lambda i: (names[i] not in known, -known.get(names[i], 0.0), i))


def _cosine(matrix: list[list[float | None]], i: int, j: int) -> float | None:
    value, own_i, own_j = matrix[i][j], matrix[i][i], matrix[j][j]
    if value is None or not own_i or not own_j or own_i <= 0 or own_j <= 0:
        return None
    return round(max(-1.0, min(1.0, value / (own_i * own_j) ** 0.5)), 3)


def displacement(
    rows: list[Row], split: str, verdicts: list[BehaviourVerdict]
) -> list[tuple[str, float, float | None]]:
    """(behaviour, change of the chosen, change of the rejected log-probability) at the last step of some curves."""
    found = []
    for item in verdicts:
        points = curve(rows, item.behaviour, split)
        last = next((row for row in reversed(points) if row.get("chosen_displacement") is not None), None)
        if last is not None:
            found.append((item.behaviour, last["chosen_displacement"], last.get("rejected_displacement")))
    return found


def displacement_figure(folder: RunFolder, verdicts: list[BehaviourVerdict]) -> Figure | None:
    """Per behaviour, how far the chosen and the rejected answers' log-probabilities moved, or will move."""
    observed, forecast = (displacement(rows, folder.split, verdicts) for rows in (folder.observed, folder.forecast))
    found = observed or forecast
    if not found:
        return None
    numbers = list(range(1, len(found) + 1))
    bars: Row = {"type": "scatter", "mode": "lines", "x": [], "y": [], "hoverinfo": "skip", "showlegend": False}
    bars["line"] = {"color": GREY, "width": 1}
    for i, (_, chosen, rejected) in zip(numbers, found, strict=True):
        bars["x"] += [chosen, rejected, None]
        bars["y"] += [i, i, None]
    place = dict(zip((row[0] for row in found), numbers, strict=True))
    dots = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"{name}{when}",
            "x": [row[column] for row in rows],
            "y": [place[row[0]] for row in rows],
            "text": [short(row[0], 60) for row in rows],
            "hovertemplate": f"%{{text}}<br>{name}{when}: %{{x:.2f}}<extra></extra>",
            "marker": {"color": colour, "size": 9, "symbol": symbol + shape},
        }
        for rows, when, shape in ((forecast, ", forecast", "-open"), (observed, "", ""))
        for column, name, colour, symbol in ((1, "chosen", "#2a9d6f", "circle"), (2, "rejected", "#d1495b", "diamond"))
        if rows
    ]
    layout = {
        "height": 120 + max(20 * len(found), 60),
        "margin": {"l": 190, "r": 12, "t": 36, "b": 44},
        "xaxis": {"title": {"text": "change of the mean log-probability"}, "zeroline": True, "zerolinewidth": 2},
        "yaxis": {"tickvals": numbers, "ticktext": [short(row[0], 26) for row in found]},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    }
    layout["yaxis"]["range"] = [len(found) + 0.7, 0.3]
    extra = {"narrow_ticks": [short(row[0], 14) for row in found]}
    falling = sum(chosen < 0 for _, chosen, _ in found)
    alt = f"Dot chart: the chosen answers' log-probability falls for {falling} of {len(found)} behaviours."
    return Figure("displacement", [bars, *dots], layout, alt, extra)
