"""What every objective must satisfy, over a table of all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.dynamics.flow import gradient_flow
from foretune.errors import UserError
from foretune.objectives import (
    DPO,
    EXO,
    IPO,
    ORPO,
    BetaDPO,
    BradleyTerry,
    DiscoPOP,
    DPOPositive,
    LabelSmoothed,
    NegativeLogLikelihood,
    Robust,
    Saturating,
    Shifted,
    SLiC,
    Unpaired,
    apo_down,
    apo_zero,
    bco,
    cpo,
    kto_pair,
    nca,
    simpo,
    sppo_hard,
)

BETAS = (0.01, 0.1, 0.5, 2.0)
SCALED = (DPO, IPO, SLiC, EXO, DiscoPOP, Saturating)
OBJECTIVES = [
    *(kind(beta=beta) for kind in SCALED for beta in BETAS),
    *(kind(base=base, rate=0.2) for kind in (LabelSmoothed, Robust) for base in (DPO(beta=0.5), IPO(beta=0.1))),
    Shifted(base=DPO(beta=0.5), by=3.0),
    Shifted(base=LabelSmoothed(base=DPO(beta=0.5), rate=0.1), by=-3.0),
    simpo(beta=2.0, gamma=1.0),
    EXO(beta=0.5, rate=0.3),
    DiscoPOP(beta=0.5, tau=1.0),
    NegativeLogLikelihood(),
    BradleyTerry(target=1.5),
]
SMOOTH = [objective for objective in OBJECTIVES if not isinstance(objective, SLiC | NegativeLogLikelihood)]
CONVEX = [objective for objective in OBJECTIVES if not isinstance(objective, EXO | DiscoPOP | Saturating)]
MARGINS = np.concatenate([np.linspace(-40, 40, 81), [-3.7, -0.01, 0.003, 7.3]])
EXTREMES = [-1e4, -80.0, 80.0, 1e4]

SIDED = [
    *(make(beta=beta) for make in (bco, nca, apo_zero, apo_down, sppo_hard, kto_pair) for beta in BETAS),
    bco(beta=0.1, reward_shift=0.7),
    kto_pair(beta=0.5, reference_point=2.0, desirable_weight=1.3, undesirable_weight=0.8),
    *(cpo(base=DPO(beta=beta), alpha=0.5) for beta in BETAS),
    *(DPOPositive(base=DPO(beta=beta), penalty=5.0) for beta in BETAS),
    *(ORPO(strength=strength) for strength in (0.1, 1.0)),
]
# Pairs of scores; ORPO's are log-probabilities per token.
SCORES = np.stack(np.meshgrid(np.linspace(-40, 40, 16), np.linspace(-38, 41, 16))).reshape(2, -1)

every = pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
smooth = pytest.mark.parametrize("objective", SMOOTH, ids=str)
sided = pytest.mark.parametrize("objective", SIDED, ids=str)


def away_from_kinks(objective):
    if isinstance(objective, SLiC):
        return MARGINS[np.abs(objective.beta * MARGINS - 1) > 1e-6]
    return MARGINS


def scores_of(objective):
    return -np.abs(SCORES) / 10 - 1e-3 if isinstance(objective, ORPO) else SCORES


def derivative(function, margin):
    leaf = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return slope.numpy()


@every
def test_slope_is_the_derivative_of_the_value(objective):
    margin = away_from_kinks(objective)
    lost = 0.0 if objective in CONVEX else 1e-14  # digits that autograd loses in 1 − σ
    np.testing.assert_allclose(
        objective.slope(margin), derivative(objective.torch_value, margin), rtol=1e-10, atol=lost
    )


@pytest.mark.parametrize("objective", [kind(beta=beta) for kind in (DPO, IPO, SLiC) for beta in BETAS], ids=str)
def test_slope_at_the_kink_is_the_one_torch_takes(objective):
    margin = np.array([0.0, 1 / objective.beta])
    np.testing.assert_allclose(objective.slope(margin), derivative(objective.torch_value, margin), rtol=1e-10)


@smooth
def test_curvature_is_the_derivative_of_the_slope(objective):
    def slope(leaf):
        (found,) = torch.autograd.grad(objective.torch_value(leaf).sum(), leaf, create_graph=True)
        return found

    # autograd loses digits in 1 − σ, hence the absolute tolerance
    np.testing.assert_allclose(objective.curvature(MARGINS), derivative(slope, MARGINS), rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("beta", BETAS)
def test_hinge_has_no_curvature_between_finite_differences_of_its_slope(beta):
    objective = SLiC(beta=beta)
    margin = away_from_kinks(objective)
    differences = (objective.slope(margin + 1e-8) - objective.slope(margin)) / 1e-8
    np.testing.assert_array_equal(objective.curvature(margin), differences)


@every
def test_numpy_and_torch_values_agree(objective):
    told = objective.torch_value(torch.tensor(MARGINS)).numpy()
    np.testing.assert_allclose(objective.value(MARGINS), told, rtol=1e-12, atol=1e-300)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_margins_stay_finite(objective, dtype):
    margin = torch.tensor(EXTREMES, dtype=dtype, requires_grad=True)
    value = objective.torch_value(margin)
    (slope,) = torch.autograd.grad(value.sum(), margin)
    assert value.dtype == dtype
    assert value.isfinite().all() and slope.isfinite().all()
    # 8 bits of mantissa; IPO squares a difference of the same precision
    np.testing.assert_allclose(
        value.detach().double(), objective.value(margin.detach().double().numpy()), rtol=0.03, atol=1e-6
    )


@every
def test_numpy_is_finite_at_extreme_margins_without_a_warning(objective):
    margin = np.array(EXTREMES)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        figures = [objective.value(margin), objective.slope(margin), objective.curvature(margin)]
    assert np.isfinite(figures).all()


@every
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_the_shape_of_the_margin_is_kept(objective, shape):
    margin = np.zeros(shape)
    for function in (objective.value, objective.slope, objective.curvature):
        assert np.shape(function(margin)) == shape


@pytest.mark.parametrize("objective", CONVEX, ids=str)
@settings(max_examples=30)
@given(left=st.floats(-200, 200), right=st.floats(-200, 200))
def test_values_are_convex_and_their_slope_does_not_fall(objective, left, right):
    low, high = sorted([left, right])
    assert objective.slope(np.array(low)) <= objective.slope(np.array(high)) + 1e-12
    middle = objective.value(np.array((low + high) / 2))
    ends = (objective.value(np.array(low)) + objective.value(np.array(high))) / 2
    assert middle <= ends + 1e-12 * (1 + abs(ends))


@given(margin=st.floats(-500, 500), beta=st.floats(1e-3, 10))
def test_swapping_chosen_and_rejected_changes_dpo_by_the_scaled_margin(margin, beta):
    objective = DPO(beta=beta)
    swapped = objective.value(np.array(margin)) - objective.value(np.array(-margin))
    np.testing.assert_allclose(swapped, -beta * margin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("beta", "other"), [(0.1, 0.5), (0.05, 2.0)])
def test_scaled_margins_of_dpo_depend_on_beta_squared_times_time(beta, other):
    generator = np.random.default_rng(0)
    features, weights = generator.normal(size=(6, 3)), generator.uniform(0.5, 2, 6)
    times = np.array([0.0, 1.0, 5.0, 30.0]) / beta**2
    path = gradient_flow(features, weights, DPO(beta=beta), times=times)
    again = gradient_flow(features, weights, DPO(beta=other), times=times * (beta / other) ** 2)
    margins = beta * path @ features.T
    assert np.abs(margins[-1]).max() > 1
    np.testing.assert_allclose(margins, other * again @ features.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_a_beta_that_is_not_positive_is_refused(kind, beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        kind(beta=beta)


@pytest.mark.parametrize("kind", [LabelSmoothed, Robust])
@pytest.mark.parametrize("rate", [-0.1, 0.5])
def test_a_share_of_flipped_labels_that_leaves_nothing_to_learn_is_refused(kind, rate):
    with pytest.raises(ValueError, match="must lie in"):
        kind(rate=rate)


def test_exo_needs_smoothed_labels_and_discopop_a_low_temperature():
    with pytest.raises(ValueError, match="EXO needs label smoothing"):
        EXO(rate=0.0)
    with pytest.raises(ValueError, match="discopop_tau must lie in"):
        DiscoPOP(tau=1.5)


@pytest.mark.parametrize("base", [DPO(beta=0.5), IPO(beta=0.1), SLiC(beta=0.3)], ids=str)
def test_swapped_labels_exchange_the_shares_of_smoothed_ones(base):
    smoothed = LabelSmoothed(base=base, rate=0.2)
    kept, swapped = smoothed.value(MARGINS), smoothed.value(-MARGINS)
    np.testing.assert_allclose(kept + swapped, base.value(MARGINS) + base.value(-MARGINS), rtol=1e-12)


@pytest.mark.parametrize("base", [DPO(beta=0.5), IPO(beta=0.1)], ids=str)
def test_the_robust_loss_is_right_on_average_over_flipped_labels(base):
    robust = Robust(base=base, rate=0.3)
    noisy = 0.7 * robust.value(MARGINS) + 0.3 * robust.value(-MARGINS)
    np.testing.assert_allclose(noisy, base.value(MARGINS), rtol=1e-10, atol=1e-10)


@smooth
def test_a_kernel_twice_as_large_runs_through_the_same_margins_in_half_the_time(objective):
    generator = np.random.default_rng(0)
    features, weights = generator.normal(size=(6, 3)), generator.uniform(0.5, 2, 6)
    times = np.array([0.0, 0.5, 1.0, 2.0])
    path = gradient_flow(features, weights, objective, times=times)
    longer = gradient_flow(np.sqrt(2) * features, weights, objective, times=times / 2)
    np.testing.assert_allclose(np.sqrt(2) * longer @ features.T, path @ features.T, rtol=2e-5, atol=1e-6)


@sided
def test_slopes_of_both_sides_are_derivatives(objective):
    scores = scores_of(objective)
    leaf = torch.tensor(scores, requires_grad=True)
    (slopes,) = torch.autograd.grad(objective.torch_value(*leaf).sum(), leaf)
    np.testing.assert_allclose(objective.slopes(*scores), slopes.numpy(), rtol=1e-9, atol=1e-14)


@sided
def test_the_curvature_of_both_sides_is_the_derivative_of_their_slopes(objective):
    scores = scores_of(objective)
    leaf = torch.tensor(scores, requires_grad=True)
    (slopes,) = torch.autograd.grad(objective.torch_value(*leaf).sum(), leaf, create_graph=True)
    rows = [
        torch.autograd.grad(own.sum(), leaf, retain_graph=True)[0] if own.requires_grad else torch.zeros_like(leaf)
        for own in slopes
    ]
    np.testing.assert_allclose(objective.curvature(*scores), torch.stack(rows).numpy(), rtol=1e-7, atol=1e-12)


@sided
def test_values_of_both_sides_agree_with_torch_and_keep_their_shape(objective):
    scores = scores_of(objective)
    told = objective.torch_value(*torch.tensor(scores)).numpy()
    np.testing.assert_allclose(objective.value(*scores), told, rtol=1e-10, atol=1e-300)
    grid = scores[:, :6].reshape(2, 2, 3)
    assert objective.value(*grid).shape == (2, 3)
    assert objective.slopes(*grid).shape == (2, 2, 3)
    assert objective.curvature(*grid).shape == (2, 2, 2, 3)


@sided
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(objective, dtype):
    lengths = [-80.0, -0.01] if isinstance(objective, ORPO) else [-80.0, 80.0]
    leaf = torch.tensor([[c, r] for c in lengths for r in lengths], dtype=dtype).T.requires_grad_()
    value = objective.torch_value(*leaf)
    (slopes,) = torch.autograd.grad(value.sum(), leaf)
    assert value.dtype == dtype and value.isfinite().all() and slopes.isfinite().all()
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        exact = objective.value(*leaf.detach().double().numpy())
    np.testing.assert_allclose(value.detach().double(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("objective", [cpo(alpha=0.0), Shifted(by=2.0)], ids=str)
def test_a_shift_common_to_both_scores_changes_no_loss_of_their_difference(objective):
    chosen, rejected = SCORES
    if isinstance(objective, Shifted):
        pairs = [objective.value(chosen + shift - (rejected + shift)) for shift in (0.0, 17.0)]
    else:
        pairs = [objective.value(chosen + shift, rejected + shift) for shift in (0.0, 17.0)]
        np.testing.assert_allclose(objective.slopes(chosen, rejected).sum(0), 0, atol=1e-15)
    np.testing.assert_allclose(*pairs, rtol=1e-9)


@pytest.mark.parametrize("make", [bco, nca, apo_zero, apo_down, sppo_hard, kto_pair])
def test_a_shift_common_to_both_scores_matters_to_a_loss_of_both(make):
    assert np.abs(make().slopes(*SCORES).sum(0)).max() > 1e-3


def test_a_loss_without_its_likelihood_is_that_of_the_margin():
    chosen, rejected = SCORES
    np.testing.assert_allclose(
        cpo(base=DPO(beta=0.3), alpha=0.0).value(*SCORES), DPO(beta=0.3).value(chosen - rejected)
    )
    free = DPOPositive(base=DPO(beta=0.3), penalty=0.0)
    np.testing.assert_allclose(free.slopes(*SCORES)[0], DPO(beta=0.3).slope(chosen - rejected))


def test_unpaired_rows_are_the_sides_of_pairs():
    objective = kto_pair(beta=0.3, reference_point=1.5, desirable_weight=1.3, undesirable_weight=0.8)
    chosen, rejected = SCORES
    log_ratio, desirable = np.concatenate([chosen, rejected]), np.repeat([True, False], len(chosen))
    for pairs, rows in (
        (objective.value(chosen, rejected), Unpaired(objective).value(log_ratio, desirable)),
        (objective.slopes(chosen, rejected).sum(0), Unpaired(objective).slope(log_ratio, desirable)),
    ):
        np.testing.assert_allclose(rows[desirable] + rows[~desirable], pairs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("label", "kind"), [(True, "desirable"), (False, "undesirable")])
def test_unpaired_rows_of_one_kind_are_refused(label, kind):
    with pytest.raises(UserError, match=f"all 3 rows are {kind}: .* needs desirable and undesirable ones"):
        Unpaired(kto_pair()).value(np.zeros(3), np.full(3, label))


def test_an_objective_of_both_responses_is_not_defined_on_unpaired_rows():
    with pytest.raises(ValueError, match="compares both responses"):
        Unpaired(apo_down())


def test_beta_follows_the_batch():
    rule = BetaDPO(beta=0.1, strength=0.5, threshold=1.0)
    assert rule.of_batch(np.array([10.0])) == DPO(beta=0.1)
    assert rule.of_batch(np.array([20.0, 40.0])).beta == pytest.approx(0.2)
    assert rule.of_batch(np.array([-1e4])).beta > 0
