"""What stand-ins would learn by heart is no part of a simulated run: about all of it, and nothing else."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from foretune.dynamics.by_heart import ByHeart, Followed, shrunk
from foretune.dynamics.margin_model import Looked
from foretune.dynamics.simulated_run import simulate_run
from foretune.objectives import DPO

TRAIN, HELD, DIM = 60, 40, 200
IS_TRAIN = np.arange(TRAIN + HELD) < TRAIN
NAMES = np.repeat("b", TRAIN + HELD)


class Linear(NamedTuple):
    """Margins linear in one vector."""

    features: torch.Tensor
    offset: torch.Tensor
    place: np.ndarray
    looked: Looked = Looked()
    sampled: dict = {}
    decayed: None = None

    def start(self):
        return {"w": torch.zeros(self.features.shape[1])}

    def shifted(self, gap):
        return self._replace(offset=self.offset + gap[np.unique(self.place, return_inverse=True)[1]])

    def margins(self, parameters, pairs, **_training):
        return self.features[self.place[pairs]] @ parameters["w"] + self.offset[pairs]

    def looking(self, parameters, pairs):
        """With the real margins of pairs that others stand for."""
        found = (self.features @ parameters["w"])[pairs] + self.offset[pairs]
        return self._replace(looked=Looked(pairs, found.double().numpy()))


def rows(seed, pull, varied=0.0):
    """Features of training and held-out rows: a common part, and one of their own; of lengths that vary."""
    generator = np.random.default_rng(seed)
    own = generator.normal(size=(TRAIN + HELD, DIM)) / 3
    lengths = np.exp(varied * generator.normal(size=(TRAIN + HELD, 1)))
    return torch.tensor(lengths * (own + pull / np.sqrt(DIM)), dtype=torch.float32)


def simulated(features, place, tmp_path, *, by_heart=None, offset=0.0, steps=60, looked=None, observations=2):
    """Margins at the end of a run on all training rows, in which `place` says who stands for whom.

    `looked`: pairs that are scored at the start and after every twelfth step.
    """
    arguments = TrainingArguments(
        str(tmp_path),
        optim="sgd",
        learning_rate=0.03,
        lr_scheduler_type="constant",
        per_device_train_batch_size=TRAIN,
        max_steps=steps,
        max_grad_norm=0.0,
        use_cpu=True,
    )
    model = Linear(features, offset + torch.zeros(len(place)), place)
    every = np.arange(len(place))

    def renewal(step, parameters):
        return None if looked is None or step % 12 else model.looking(parameters, looked)

    start = model if looked is None else model.looking(model.start(), looked)
    return simulate_run(
        start,
        arguments,
        DPO(beta=1.0),
        train_pairs=every[IS_TRAIN],
        weights=np.ones(TRAIN),
        observed=every,
        observations=observations,
        by_heart=by_heart,
        renewal=renewal,
    ).margins


def stand_ins(measured):
    """The first few training rows stand for all of them."""
    place = np.arange(TRAIN + HELD)
    place[:TRAIN] %= measured
    return place


def loss(margins):
    return np.logaddexp(0, -margins).mean()


@pytest.mark.parametrize("varied", [0.0, 0.4])
@pytest.mark.parametrize(("measured", "pull"), [(20, 0.3), (6, 0.3), (6, 1.0)])
def test_the_run_of_stand_ins_has_the_losses_of_the_run_of_all_rows(measured, pull, varied, tmp_path):
    plain, found, spread = [], [], []
    for seed in range(4):
        features, place = rows(seed, pull, varied), stand_ins(measured)
        every = np.arange(TRAIN + HELD)
        observed = every[(place == every)]
        heart = ByHeart.of(place, every[IS_TRAIN], observed, NAMES, IS_TRAIN)
        real = simulated(features, every, tmp_path)[-1]
        for own, by_heart in ((plain, None), (found, heart)):
            margins = simulated(features, place, tmp_path, by_heart=by_heart)[-1]
            own.append(loss(margins[:measured]) - loss(real[:TRAIN]))
        spread.append(margins[:measured].std() / real[:TRAIN].std())
    assert 0.6 < np.mean(spread) < 1.3
    assert np.mean(plain) < -0.05
    assert abs(np.mean(found)) < abs(np.mean(plain)) / 5


@pytest.mark.parametrize(("measured", "pull"), [(20, 0.3), (6, 0.3), (6, 1.0)])
def test_training_rows_that_are_looked_at_tell_it_where_none_is_held_out(measured, pull, tmp_path):
    plain, found = [], []
    for seed in range(4):
        features, place = rows(seed, pull), stand_ins(measured)
        every = np.arange(TRAIN + HELD)
        observed, looked = every[:TRAIN], every[measured:TRAIN]
        assert ByHeart.of(place, every[IS_TRAIN], observed, NAMES, IS_TRAIN) is None
        heart = ByHeart.of(place, every[IS_TRAIN], observed, NAMES, IS_TRAIN, looked)
        real = simulated(features, every, tmp_path)[-1]
        for own, by_heart in ((plain, None), (found, heart)):
            margins = simulated(features, place, tmp_path, by_heart=by_heart, looked=looked)[-1]
            own.append(loss(margins[:measured]) - loss(real[:TRAIN]))
    assert np.mean(plain) < -0.05
    assert abs(np.mean(found)) < abs(np.mean(plain)) / 3


def test_what_is_known_from_the_first_anchor_on_is_taken_off_what_was_recorded_before_it(tmp_path):
    features, place, every = rows(0, 0.3), stand_ins(6), np.arange(TRAIN + HELD)
    looked = every[6:TRAIN]
    heart = ByHeart.of(place, every[IS_TRAIN], every[:TRAIN], NAMES, IS_TRAIN, looked)
    runs = [
        simulated(features, place, tmp_path, by_heart=heart, looked=looked, steps=steps, observations=5)
        for steps in (16, 8)
    ]
    plain = simulated(features, place, tmp_path, looked=looked, steps=16, observations=5)
    np.testing.assert_allclose(runs[0][0], 0, atol=1e-6)
    for recorded in (1, 2):  # before step 12, the only anchor
        assert plain[recorded, :6].mean() > 1.5 * runs[0][recorded, :6].mean() > 0
    assert np.ptp(runs[1] - simulated(features, place, tmp_path, looked=looked, steps=8, observations=5)) == 0


def test_before_the_first_anchor_nothing_is_known_of_rows_that_are_looked_at():
    place, every = stand_ins(6), np.arange(TRAIN + HELD)
    model = Linear(rows(0, 0.3), torch.zeros(len(place)), place)
    looked, there = every[6:TRAIN], {"w": torch.ones(DIM)}
    heart = ByHeart.of(place, every[IS_TRAIN], every[:TRAIN], NAMES, IS_TRAIN, looked)
    start = model.looking(model.start(), looked)
    followed = Followed(heart, start, model.start())
    assert followed.shift(followed.learned(start, there)) is None
    followed.anchor(model.looking(there, looked), there)
    learned = (model.features @ there["w"]).double().numpy()
    expected = heart.shift(learned[heart.seen], learned[heart.held])
    for times in (1, 2):
        later = followed.learned(start, {"w": times * there["w"]})
        np.testing.assert_allclose(followed.shift(later), times * expected, rtol=1e-5)


def test_nothing_is_taken_off_before_the_first_step_or_from_held_out_pairs(tmp_path):
    features, place, every = rows(0, 0.3), stand_ins(6), np.arange(TRAIN + HELD)
    heart = ByHeart.of(place, every[IS_TRAIN], every[place == every], NAMES, IS_TRAIN)
    offset = torch.where(torch.from_numpy(IS_TRAIN), 2.0, 0.5)
    first, last = simulated(features, place, tmp_path, by_heart=heart, offset=offset, steps=1)
    np.testing.assert_allclose(first, offset)
    _, without = simulated(features, place, tmp_path, offset=offset, steps=1)
    np.testing.assert_array_equal(last[~IS_TRAIN], without[~IS_TRAIN])
    assert (last[IS_TRAIN] < without[IS_TRAIN]).all()


def test_none_where_each_row_is_itself_or_too_few_are_held_out():
    every = np.arange(TRAIN + HELD)
    assert ByHeart.of(every, every[IS_TRAIN], every, NAMES, IS_TRAIN) is None
    assert ByHeart.of(stand_ins(6), every[IS_TRAIN], every[: TRAIN + 1], NAMES, IS_TRAIN) is None


def test_held_out_pairs_that_others_stand_for_are_counted_once():
    every, place = np.arange(TRAIN + HELD), stand_ins(6)
    place[~IS_TRAIN] = TRAIN + every[~IS_TRAIN] % 5
    heart = ByHeart.of(place, every[IS_TRAIN], every, NAMES, IS_TRAIN)
    (_, held), *_ = heart.sides
    assert sorted(place[held]) == list(range(TRAIN, TRAIN + 5))


MIXED = np.repeat(["a", "b", "c"], [12, 10, 8])
SEEN = np.arange(len(MIXED)) % 2 > 0
PLACE = np.where(SEEN, np.arange(len(MIXED)) // 4 * 4 + 1, np.arange(len(MIXED)))


def slow_shift(learned, rows, observed):
    """Behaviour by behaviour, pair by pair."""
    gaps, noises, shares, widths, sides = {}, {}, {}, {}, {}
    for name in "abc":
        own = [row for row in rows if MIXED[row] == name]
        used = {PLACE[row] for row in own}
        seen = [learned[pair] for pair in used]
        held = [learned[pair] for pair in observed if not SEEN[pair] and MIXED[pair] == name]
        gaps[name] = np.mean(seen) - np.mean(held)
        noises[name] = np.var(held, ddof=1) / len(seen) + np.var(held, ddof=1) / len(held)
        shares[name] = 1 - len(used) / len(own)
        widths[name] = [np.median([abs(value - np.median(side)) for value in side]) ** 2 for side in (seen, held)]
        sides[name] = used, np.mean(seen)
    common = np.mean([*gaps.values()])
    spread = max(np.var([*gaps.values()], ddof=1) - np.mean([*noises.values()]), 0)
    by_heart = max(1 - sum(held for _, held in widths.values()) / sum(seen for seen, _ in widths.values()), 0)
    found = np.zeros(len(MIXED))
    for pair, name in enumerate(MIXED):
        used, mean = sides[name]
        if SEEN[pair] and PLACE[pair] in used:
            own = common + spread / (spread + noises[name]) * (gaps[name] - common)
            found[pair] = shares[name] * (own + by_heart * (learned[PLACE[pair]] - mean))
    return found


@given(st.integers(0, 500))
def test_the_shift_is_what_the_slow_twin_says_in_any_order(seed):
    generator = np.random.default_rng(seed)
    spread = np.where(SEEN, generator.uniform(0.5, 3), 1.0)
    learned = (generator.normal(size=len(MIXED)) * spread + generator.normal(size=3).repeat([12, 10, 8]) * SEEN)[PLACE]
    rows, observed = generator.permutation(np.flatnonzero(SEEN)), generator.permutation(len(MIXED))
    heart = ByHeart.of(PLACE, rows, observed, MIXED, SEEN)
    expected = slow_shift(learned, rows, observed)
    np.testing.assert_allclose(heart.shift(learned[heart.seen], learned[heart.held]), expected, atol=1e-12)


def test_gaps_that_noise_explains_are_taken_to_be_equal():
    np.testing.assert_allclose(shrunk(np.array([1.0, 2.0, 3.0]), np.full(3, 4.0)), 2.0)
    np.testing.assert_allclose(shrunk(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.5, 0.5])), [1.5, 2.0, 2.5])
    np.testing.assert_allclose(shrunk(np.array([5.0]), np.array([100.0])), 5.0)
