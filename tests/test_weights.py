"""Row weights as training takes them."""

from types import SimpleNamespace

import numpy as np
import pytest

from foretune.models.encoding import EncodedPair
from foretune.models.pairs import EncodedPairs
from foretune.verbs.prepare import Prepared


def weights(given):
    pairs = [EncodedPair(n, "b", "train", weight, [1], [2], [3], False) for n, weight in enumerate(given)]
    data = SimpleNamespace(train=SimpleNamespace(column_names=["prompt"]))
    return Prepared(None, data, None, EncodedPairs(pairs), [], "", "").weights  # pyright: ignore


@pytest.mark.parametrize("unit", [1e308, 1.0, 1e-300])
def test_weights_of_any_size_have_mean_1(unit):
    np.testing.assert_allclose(weights([unit, 0.5 * unit, 0.0, 1.5 * unit]), [4 / 3, 2 / 3, 0, 2], rtol=1e-15)


def test_scaling_changes_no_bit():
    given = np.random.default_rng(0).uniform(0, 3, 1000)
    np.testing.assert_array_equal(weights(given.tolist()), given / given.mean())
