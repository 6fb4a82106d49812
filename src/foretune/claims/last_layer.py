"""Runs of the unembedding alone, from stored states: seconds of NumPy instead of passes through the model.

The paper's setting (its code): SGD with learning rate 0.1, β = 0.01, 100 steps. Its batches are 128 rows; here each
step takes all rows.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from foretune.claims.study import Behaviour, Study
from foretune.dynamics.flow import gradient_descent
from foretune.objectives import DPO

FloatArray = NDArray[np.float64]


class Setting(NamedTuple):
    """Full-batch gradient descent."""

    beta: float
    learning_rate: float
    steps: int

    @property
    def words(self) -> str:
        """For readers."""
        return f"β = {self.beta:g}, learning rate {self.learning_rate:g}, {self.steps} steps"


PAPER = Setting(0.01, 0.1, 100)
LONG = Setting(0.1, 0.03, 300)
SETTINGS = {"trained": "the unembedding", "optimiser": "SGD, full batch", "setting": PAPER.words}


class Course(NamedTuple):
    """One behaviour along a run; each of shape (steps + 1,).

    Attributes:
        loss: mean DPO loss of the training rows.
        margin: their mean margin.
        reward_accuracy: share of them with a positive margin.
        output_accuracy: share of them in which the preferred answer is the likelier one.
        weight_change: ‖ΔW‖.
        test_accuracy: reward accuracy of the held-out rows; NaN without any.
    """

    loss: FloatArray
    margin: FloatArray
    reward_accuracy: FloatArray
    output_accuracy: FloatArray
    weight_change: FloatArray
    test_accuracy: FloatArray


def alone(study: Study, setting: Setting) -> list[Course]:
    """Each behaviour trained alone, in the order of `study.behaviours`."""

    def courses() -> list[Course]:
        return [course(study, item, descent(item.phi, setting), DPO(beta=setting.beta)) for item in study.behaviours]

    return study.once(f"alone {setting}", courses)


def descent(phi: FloatArray, setting: Setting, weights: FloatArray | None = None) -> FloatArray:
    """The path u of descent on features (n, hidden) with row weights (n,), shape (steps + 1, hidden)."""
    weights = np.ones(len(phi)) if weights is None else weights
    objective = DPO(beta=setting.beta)
    return gradient_descent(phi, weights, objective, learning_rate=setting.learning_rate, steps=setting.steps)


def course(study: Study, item: Behaviour, path: FloatArray, objective: DPO) -> Course:
    """What a path of weights, shape (steps + 1, hidden), does to one behaviour."""
    margins = path @ item.phi.T
    reference = item.sign * (item.states @ (study.answer_rows[0] - study.answer_rows[1]))
    held_out = path @ (item.test_sign[:, None] * item.test_states).T
    return Course(
        objective.value(margins).mean(1),
        margins.mean(1),
        accuracy(margins),
        accuracy(reference + margins),
        np.linalg.norm(path, axis=1),
        accuracy(held_out) if held_out.shape[1] else np.full(len(path), np.nan),
    )


def accuracy(margins: FloatArray) -> FloatArray:
    """Share of positive margins, (…, n) → (…,); a margin of exactly 0 counts half."""
    return (margins > 0).mean(-1) + (margins == 0).mean(-1) / 2


def adam_path(phi: FloatArray, *, beta: float = 0.01, learning_rate: float = 1e-3, steps: int = 100) -> FloatArray:
    """The path u of torch's Adam on both answers' rows, shape (steps + 1, hidden); defaults are the follow-up's."""
    # both rows of W move alike, in opposite directions: v is one of them, u = √2 v, and margins are φ·u
    rows = torch.from_numpy(np.sqrt(2) * phi)
    moved = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([moved], lr=learning_rate)
    objective, path = DPO(beta=beta), [moved.detach().numpy().copy()]
    for _ in range(steps):
        optimiser.zero_grad()
        objective.torch_value(rows @ moved).mean().backward()
        optimiser.step()
        path.append(moved.detach().numpy().copy())
    return np.sqrt(2) * np.array(path)


def initial_rate(phi: FloatArray, objective: DPO) -> float:
    """−dL/dt at the start, measured: the loss that one tiny step of descent takes away, over its length."""
    tiny = 1e-4 / (objective.beta**2 * np.mean(np.sum(phi**2, axis=1)))
    scaled = objective.beta * (phi @ (tiny * objective.beta / 2 * phi.mean(0)))
    # log 2 − log(1 + e^{−h}), without losing its digits
    return float(-np.mean(np.log1p(np.expm1(-scaled) / 2)) / tiny)
