"""What one curve says of one behaviour: how far the loss fell, when, and in which rank."""

from dataclasses import dataclass, replace

from foretune.report.folder import Row, RunFolder, curve

HALF = 0.5
NOISE = 0.05
LEAST_SCALE = 0.05


@dataclass(frozen=True)
class Outcome:
    """Where a behaviour's curve starts, ends, and how it gets there.

    Attributes:
        initial_loss: Loss at the first step of the curve.
        final_loss: Loss at its last step.
        highest_loss: The highest loss on the way.
        final_step: The last step.
        half_step: The step at which the fall reaches half of the scale; `None` if it never does.
        rank: 1 for the lowest final loss.
        reward_accuracy: Share of pairs with a positive margin at the end.
        output_accuracy: Share of pairs whose chosen answer is the likelier one at the end.
        margin: Mean margin at the end.
        num_pairs: Pairs that were averaged.
    """

    initial_loss: float
    final_loss: float
    highest_loss: float
    final_step: int
    half_step: float | None = None
    rank: int | None = None
    reward_accuracy: float | None = None
    output_accuracy: float | None = None
    margin: float | None = None
    num_pairs: int | None = None

    @property
    def drop(self) -> float:
        """How far the loss fell; negative when it rose."""
        return self.initial_loss - self.final_loss


def outcomes(folder: RunFolder, rows: list[Row], *, trained_on: str = "mixture") -> dict[str, Outcome]:
    """One outcome per behaviour that has a curve with a loss at two steps or more."""
    curves = {name: _with_loss(curve(rows, name, folder.split, trained_on)) for name in folder.names}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    found = {name: _outcome(points) for name, points in curves.items()}
    target = HALF * scale_of(found)
    ranks = {name: i + 1 for i, name in enumerate(sorted(found, key=lambda name: found[name].final_loss))}
    return {
        name: replace(outcome, half_step=_step_of_drop(curves[name], target), rank=ranks[name])
        for name, outcome in found.items()
    }


def scale_of(found: dict[str, Outcome]) -> float:
    """The largest fall of a loss, but at least 5% of the highest initial loss: the yardstick of all verdicts."""
    if not found:
        return 0.0
    largest = max(outcome.drop for outcome in found.values())
    return max(largest, LEAST_SCALE * max(abs(outcome.initial_loss) for outcome in found.values()), 1e-9)


def _with_loss(points: list[Row]) -> list[Row]:
    return [row for row in points if row.get("loss") is not None]


def _outcome(points: list[Row]) -> Outcome:
    first, last = points[0], points[-1]
    return Outcome(
        initial_loss=first["loss"],
        final_loss=last["loss"],
        highest_loss=max(row["loss"] for row in points),
        final_step=last["step"],
        reward_accuracy=last.get("reward_accuracy"),
        output_accuracy=last.get("output_accuracy"),
        margin=last.get("margin"),
        num_pairs=last.get("num_pairs"),
    )


def _step_of_drop(points: list[Row], target: float) -> float | None:
    """The first step at which the fall reaches the target, straight lines between the points."""
    start = points[0]["loss"]
    for before, after in zip(points, points[1:], strict=False):
        low, high = start - before["loss"], start - after["loss"]
        if high >= target:
            share = (target - low) / (high - low) if high > low else 0.0
            return before["step"] + max(share, 0.0) * (after["step"] - before["step"])
    return None
