"""How well a description of a run (a forecast, another run, a score a behaviour) fits the run that was observed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foretune.objectives import DPO
from foretune.verification.compare import margin_fit, spearman

LAZY_LOSS = 0.68
DRAWS = 1000
FIGURES = ("spearman_loss", "spearman_same_pairs", "margin_r2", "margin_slope", "loss_mae")


class Course(NamedTuple):
    """Margins of some pairs, against the reference, at some steps.

    Attributes:
        steps: shape (T,).
        pair_id: shape (n,).
        behaviour: of each pair, shape (n,).
        margins: in nats, shape (T, n).
        beta: of the loss.
    """

    steps: list[int]
    pair_id: NDArray[np.int64]
    behaviour: NDArray[np.str_]
    margins: NDArray[np.float64]
    beta: float = 0.1

    def at(self, step: int) -> NDArray[np.float64]:
        """Margins after a step, shape (n,)."""
        return self.margins[self.steps.index(step)]

    def only(self, pair_id: NDArray[np.int64]) -> "Course":
        """Of these pairs alone."""
        kept = np.isin(self.pair_id, pair_id)
        return self._replace(pair_id=self.pair_id[kept], behaviour=self.behaviour[kept], margins=self.margins[:, kept])

    def losses(self, step: int) -> dict[str, float]:
        """Mean loss of each behaviour after a step."""
        return _means(self.at(step), self.behaviour, self.beta)

    def mean_loss(self, step: int) -> float:
        """Mean over behaviours."""
        return float(np.mean(list(self.losses(step).values())))


def _means(margins: NDArray[np.float64], behaviour: NDArray[np.str_], beta: float) -> dict[str, float]:
    values = DPO(beta=beta).value(margins)
    return {str(name): float(values[behaviour == name].mean()) for name in np.unique(behaviour)}


def lazy_step(observed: Course) -> int | None:
    """The last observed step at which the mean loss is still at least LAZY_LOSS."""
    steps = [step for step in observed.steps if step > 0 and observed.mean_loss(step) >= LAZY_LOSS]
    return steps[-1] if steps else None


def fit(
    said: Course, observed: Course, step: int, said_step: int | None = None, *, bounds: bool = True
) -> dict[str, Any]:
    """Figures of `said` at a step of the observed run (`said_step`: at another step of its own), with intervals.

    Losses are means over all pairs that each side has; R², slope and `spearman_same_pairs` are over the pairs that both
    have. Intervals are 95 % bootstraps over behaviours, each of which brings its pairs along.
    """
    ours, theirs = said.losses(step if said_step is None else said_step), observed.losses(step)
    place = {int(pair): index for index, pair in enumerate(observed.pair_id)}
    common = [index for index, pair in enumerate(said.pair_id) if int(pair) in place]
    forecast = said.at(step if said_step is None else said_step)[common]
    happened = observed.at(step)[[place[int(said.pair_id[index])] for index in common]]
    owner, names = said.behaviour[common], sorted(theirs)
    alike = [_means(margins, owner, said.beta) for margins in (forecast, happened)]

    def figures(drawn: list[str]) -> tuple[float, ...]:
        pairs = np.concatenate([np.flatnonzero(owner == name) for name in drawn])
        left, right = (np.array([losses[name] for name in drawn]) for losses in (ours, theirs))
        return (
            spearman(list(left), list(right)),
            spearman(*([losses[name] for name in drawn] for losses in alike)),
            *margin_fit(forecast[pairs], happened[pairs]),
            float(np.abs(left - right).mean()),
        )

    found = {
        "step": step,
        "pairs": len(common),
        **dict(zip(FIGURES, figures(names), strict=True)),
        "mean_loss": float(np.mean(list(ours.values()))),
        "observed_mean_loss": float(np.mean(list(theirs.values()))),
    }
    return {**found, "intervals": intervals(figures, names)} if bounds else found


def intervals(figures: Any, names: list[str], keys: tuple[str, ...] = FIGURES) -> dict[str, list[float]]:
    """95 % bootstrap intervals over behaviours."""
    generator = np.random.default_rng(0)
    drawn = [[names[i] for i in generator.integers(len(names), size=len(names))] for _ in range(DRAWS)]
    with np.errstate(all="ignore"):
        found = np.array([figures(draw) for draw in drawn], dtype=float)
        ends = np.nanpercentile(found, [2.5, 97.5], axis=0).T
    return {key: [round(float(end), 4) for end in pair] for key, pair in zip(keys, ends, strict=True)}


def described(said: Course, observed: Course, *, after: int = 0) -> dict[str, Any]:
    """Figures at the end, at the end of the lazy part, and without intervals at every common step after `after`."""
    steps = [step for step in said.steps if step in observed.steps and step > after]
    lazy = lazy_step(observed)
    return {
        "end": fit(said, observed, steps[-1]),
        "lazy": fit(said, observed, lazy) if lazy in steps else None,
        "over_run": [fit(said, observed, step, bounds=False) for step in steps],
        "losses": rounded(said.losses(steps[-1])),
    }


def ranked(scores: Mapping[str, float], observed: Course) -> dict[str, Any]:
    """Figures of scores, one a behaviour, of which higher ones promise lower losses."""
    found: dict[str, Any] = {}
    for part, step in (("end", observed.steps[-1]), ("lazy", lazy_step(observed))):
        if step is None:
            found[part] = None
            continue
        losses = observed.losses(step)

        def figures(drawn: list[str], losses: Mapping[str, float] = losses) -> tuple[float]:
            return (spearman([-scores[name] for name in drawn], [losses[name] for name in drawn]),)

        names = sorted(losses)
        found[part] = {
            "step": step,
            "spearman_loss": figures(names)[0],
            "intervals": intervals(figures, names, ("spearman_loss",)),
        }
    return found


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """To four digits."""
    return {name: round(value, 4) for name, value in values.items()}
