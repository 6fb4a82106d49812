"""Around another anchor margins go on from halfway between what they have come to and what is found there."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from foretune.dynamics.margin_model import all_margins, taken_up
from foretune.dynamics.simulated_run import simulate_run
from foretune.objectives import DPO

PLACE = np.array([1, 0, 1, 0])


class Growth(NamedTuple):
    """Margins in first order around `at` of exp(θ) − 1 times 1 and 2: one parameter, two measured pairs of four."""

    at: torch.Tensor
    gap: torch.Tensor = torch.zeros(2)
    place: np.ndarray = PLACE
    sampled: dict = {}
    decayed: None = None

    def start(self):
        return {"theta": self.at}

    def shifted(self, gap):
        return self._replace(gap=self.gap + gap)

    def margins(self, parameters, pairs, *, training=False):  # noqa: ARG002
        measured = torch.from_numpy(self.place)[pairs]
        gain = torch.exp(self.at) * (1 + parameters["theta"] - self.at) - 1
        return gain * (1.0 + measured) + self.gap[measured]


def growth(at):
    return Growth(torch.tensor([float(at)]))


def margins(model, theta):
    return model.margins({"theta": torch.tensor([float(theta)])}, torch.arange(4)).numpy()


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1))
def test_margins_begin_halfway_and_follow_the_new_features(first, second, later):
    before, found = growth(first).shifted(torch.tensor([0.3, -0.2])), growth(second)
    model = taken_up(found, before, found.start())
    both = margins(before, second), margins(found, second)
    np.testing.assert_allclose(margins(model, second), np.mean(both, axis=0), atol=1e-5)
    changes = [margins(own, later) - margins(own, second) for own in (model, found)]
    np.testing.assert_allclose(*changes, atol=1e-5)


def test_a_simulated_run_is_taken_up_at_each_anchor(tmp_path):
    theta, anchors = {0: 0.0}, {0: growth(0.0)}

    def renewal(step, parameters):
        theta[step] = parameters["theta"].item()
        if step % 4:
            return None
        anchors[step] = growth(theta[step])
        return anchors[step]

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, learning_rate=0.2, max_steps=12, optim="sgd", max_grad_norm=0.0, report_to=[]
    )
    run = simulate_run(
        anchors[0],
        arguments,
        DPO(beta=0.5),
        train_pairs=range(4),
        weights=np.ones(4),
        observed=range(4),
        observations=13,
        renewal=renewal,
    )
    theta[12] = run.end["theta"].item()
    expected, gap = [np.zeros(4)], 0.0
    for step in range(1, 13):
        since = 4 * ((step - 1) // 4)
        predicted = margins(anchors[since], theta[step]) + gap
        if step in anchors:
            gap = (predicted - margins(anchors[step], theta[step])) / 2
            predicted = margins(anchors[step], theta[step]) + gap
        expected.append(predicted)
    np.testing.assert_allclose(run.margins, expected, atol=1e-5)
    assert run.margins[-1].min() > 0.5


def test_stand_ins_are_computed_once():
    class Asked(Growth):
        def margins(self, parameters, pairs, *, training=False):
            asked.extend(pairs.tolist())
            return super().margins(parameters, pairs, training=training)

    asked = []
    pairs = np.array([3, 2, 0, 2, 1])
    found = all_margins(Asked(torch.tensor([0.5])), {"theta": torch.tensor([0.7])}, pairs)
    np.testing.assert_allclose(found, margins(growth(0.5), 0.7)[pairs], rtol=1e-6)
    assert len(asked) == len(np.unique(PLACE))
