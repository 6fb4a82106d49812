"""R8: DPO moves the two sides of the trained behaviour farther apart."""

import numpy as np
from numpy.typing import NDArray

from foretune.claims import tuning
from foretune.claims.claim import PAPER, Check, Claim, Evidence, Plot, Series, above
from foretune.claims.intervals import mean
from foretune.claims.study import Behaviour, Study


def run(study: Study) -> Evidence:
    """‖Δ‖ of the trained rows before and after, in the last layer and in all; a picture of one behaviour."""
    items = tuning.tuned(study)
    checks, plots, lines, settings = [], [], [], {"behaviours": len(items)}
    for trainable in tuning.trainables(study):
        what = tuning.WORDS[trainable]
        settings |= {f"{what}: {name}": value for name, value in tuning.settings_of(study, trainable).items()}
        runs = [tuning.aligned(study, item, trainable) for item in items]
        # every row's embedding of the last prompt token is the same, so its ‖Δ‖ is 0
        growth = np.log([found.distances[1, 1:] / found.distances[0, 1:] for found in runs])
        shape = [
            _relative(item, found.after) / _relative(item, found.before)
            for item, found in zip(items, runs, strict=True)
        ]
        length = [
            np.linalg.norm(found.after, axis=1).mean() / np.linalg.norm(found.before, axis=1).mean() for found in runs
        ]
        checks += [
            Check(f"{what}: mean log ratio of ‖Δ‖ after over before, last layer", mean(growth[:, -1]), above(0.0)),
            Check(f"control, {what}: mean log ratio of ‖Δ‖ over the spread, last layer", mean(np.log(shape))),
            Check(f"control, {what}: mean log ratio of the length of the states", mean(np.log(length))),
        ]
        layers = list(range(1, growth.shape[1] + 1))
        lines.append(Series(what, layers, np.exp(growth.mean(0)).tolist(), mode="lines+markers"))
        shown = max(range(len(items)), key=lambda place: growth[place, -1])
        for when, states in (("before", runs[shown].before), ("after", runs[shown].after)):
            plots.append(_picture(items[shown], states, f"{when} training, {what}"))
    caption = "Geometric mean over behaviours; the last layer is the one that the output layer reads."
    plots.insert(0, Plot("layer", "‖Δ‖ after over before", lines, caption))
    return Evidence(checks, plots, settings)


def _relative(item: Behaviour, states: NDArray[np.float64]) -> float:
    """‖Δ̂‖ over the root of the mean variance within the two sides."""
    within = sum(states[item.sign == side].var(0, ddof=1).sum() for side in (1, -1)) / 2
    return item._replace(states=states).distance / float(np.sqrt(within))


def _picture(item: Behaviour, states: NDArray[np.float64], when: str) -> Plot:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(states) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(states)
    series = [
        Series(name, places[item.sign == side, 0].tolist(), places[item.sign == side, 1].tolist())
        for name, side in (("first answer preferred", 1), ("second answer preferred", -1))
    ]
    return Plot("t-SNE 1", "t-SNE 2", series, f"{item.name}, {when}: final states of the trained rows (t-SNE).")


CLAIM = Claim(
    "R8",
    "Alignment makes behaviours easier to distinguish",
    "Training on a behaviour with DPO increases its ‖Δ‖.",
    PAPER,
    run,
)
