"""Studies of synthetic states, whose truth is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from foretune.claims.study import Behaviour, Study
from foretune.verbs.progress import Progress

ROWS, HELD_OUT, DIM = 40, 40, 64


def behaviour(name, difference, *, centre=0.0, spread=1.0, seed=0, plus=ROWS // 2, minus=ROWS // 2) -> Behaviour:
    """Gaussian classes around centre ± difference/2."""
    generator = np.random.default_rng(seed)

    def rows(first, second):
        sign = np.repeat([1.0, -1.0], [first, second])
        return centre + sign[:, None] * difference / 2 + spread * generator.normal(size=(len(sign), DIM)), sign

    states, sign = rows(plus, minus)
    return Behaviour(name, np.arange(len(sign)), states, sign, *rows(HELD_OUT // 2, HELD_OUT // 2))


def study_of(behaviours, tmp_path) -> Study:
    """A study that has these behaviours and a model without a final norm; its prompts are no text."""
    table = [{"prompt": [{"role": "user", "content": ""}]}]
    job = SimpleNamespace(run=SimpleNamespace(path=tmp_path))
    loaded = SimpleNamespace(model=SimpleNamespace(base_model=SimpleNamespace()))
    prepared = SimpleNamespace(job=job, rows=lambda split: table, loaded=loaded)
    study = Study(prepared, Progress.silent())
    study.__dict__ |= {
        "behaviours": behaviours,
        "answer_rows": np.random.default_rng(5).normal(size=(2, DIM)),
        "answer_probabilities": lambda item: (np.full(len(item.sign), 0.2), np.full(len(item.sign), 0.3)),
    }
    return study


@pytest.fixture
def distinct(tmp_path) -> Study:
    """Sixteen behaviours in orthogonal directions, each farther apart than the one before."""
    axes = np.eye(DIM)
    found = [behaviour(f"b{i:02}", (3 + i) * axes[i], seed=i, spread=0.3) for i in range(16)]
    return study_of(found, tmp_path)
