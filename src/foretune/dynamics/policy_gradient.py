"""Reward and KL under KL-regularised policy gradient: exact for one-token answers, first order for longer ones.

The objective of RLHF (Ziegler et al., 2019, arXiv 1909.08593, equation 2) over prompts x with shares p(x):

    J(π) = Σ_x p(x) [ Σ_y π(y|x) r(x, y) − β KL(π(·|x) ‖ π_ref(·|x)) ]

Where an answer is one token of a few, π(·|x) is a softmax over the answers' logits z(x), and all of this is known
without sampling. The policy is taken over the listed answers alone: mass elsewhere is divided among them in
proportion. Its optimum is π* ∝ π_ref e^{r/β} (Korbak et al., 2022, arXiv 2205.11275), and there
J(π*) = β Σ_x p(x) log Σ_y π_ref e^{r/β}.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import log_softmax, logsumexp

from foretune.objectives.base import FloatArray


class PolicyProblem(NamedTuple):
    """n prompts with the same number of possible answers.

    Attributes:
        reference: log π_ref of the answers up to a constant a prompt (their logits), nats, shape (n, answers).
        rewards: r(x, y), shape (n, answers).
        beta: weight of the KL divergence (≥ 0).
        shares: p(x), shape (n,), sum 1.
    """

    reference: FloatArray
    rewards: FloatArray
    beta: float
    shares: FloatArray

    def expected_reward(self, logits: FloatArray) -> FloatArray:
        """Σ_y π(y|x) r(x, y) of each prompt, shape (…, n), for logits of shape (…, n, answers)."""
        return (np.exp(log_softmax(logits, -1)) * self.rewards).sum(-1)

    def kl(self, logits: FloatArray) -> FloatArray:
        """KL(π ‖ π_ref) of each prompt in nats, shape (…, n)."""
        policy = log_softmax(logits, -1)
        return (np.exp(policy) * (policy - log_softmax(self.reference, -1))).sum(-1)

    def value(self, logits: FloatArray) -> FloatArray:
        """J, shape (…)."""
        return (self.expected_reward(logits) - self.beta * self.kl(logits)) @ self.shares

    def gradient(self, logits: FloatArray) -> FloatArray:
        """∂(reward − β KL)/∂z of each prompt: π(y)(a(y) − Σ π a), a = r − β log π/π_ref; shape (n, answers)."""
        policy = log_softmax(logits, -1)
        advantage = self.rewards - self.beta * (policy - log_softmax(self.reference, -1))
        weight = np.exp(policy)
        return weight * (advantage - (weight * advantage).sum(-1, keepdims=True))

    def optimum(self) -> FloatArray:
        """Log π*, shape (n, answers).

        Raises:
            ValueError: beta is 0; the optimum is then the best answer alone.
        """
        if not self.beta > 0:
            raise ValueError("without a KL term (beta 0) the optimum is the best answer alone: give a beta above 0.")
        return log_softmax(self.reference + self.rewards / self.beta, -1)

    def optimal_value(self) -> float:
        """J(π*) = β Σ_x p(x) log Σ_y π_ref(y|x) e^{r/β}.

        >>> problem = policy_problem(np.zeros((1, 2)), np.array([[1.0, 0.0]]), beta=1.0)
        >>> round(problem.optimal_value(), 6)  # log of the mean of e and 1
        0.620115
        """
        tilted = log_softmax(self.reference, -1) + self.rewards / self.beta
        return self.beta * float(np.asarray(logsumexp(tilted, -1)) @ self.shares)


def policy_problem(
    reference: FloatArray, rewards: FloatArray, *, beta: float, shares: FloatArray | None = None
) -> PolicyProblem:
    """The problem with shares scaled to sum 1 (None: all prompts alike); arguments as of `PolicyProblem`."""
    shares = np.ones(len(reference)) if shares is None else shares
    return PolicyProblem(np.asarray(reference, float), np.asarray(rewards, float), beta, shares / shares.sum())


def logits_flow(problem: PolicyProblem, *, times: FloatArray, tolerance: float = 1e-8) -> FloatArray:
    """Logits along the gradient flow of J(x) in free logits, each prompt by itself: shape (len(times), n, answers).

    Args:
        problem: what is climbed; shares do not matter.
        times: not decreasing, from 0; Σ learning rates.
        tolerance: relative local error.
    """
    return _integrate(problem.gradient, problem.reference, times, tolerance)


def output_layer_flow(
    problem: PolicyProblem, features: FloatArray, *, times: FloatArray, tolerance: float = 1e-8
) -> FloatArray:
    """ΔW along the gradient flow of J in the answers' rows of the output layer, shape (len(times), answers, hidden).

    The logits of any prompts with hidden states h are then their reference's + h ΔWᵀ: dΔW/dt = Σ_x p(x) g(x) h(x)ᵀ, g
    the gradient in the logits.

    Args:
        problem: what is climbed.
        features: hidden state at the last token of each prompt, shape (n, hidden).
        times: not decreasing, from 0; Σ learning rates of SGD.
        tolerance: relative local error.
    """
    weighted = problem.shares[:, None] * features

    def velocity(change: FloatArray) -> FloatArray:
        return problem.gradient(problem.reference + features @ change.T).T @ weighted

    start = np.zeros((problem.reference.shape[1], features.shape[1]))
    return _integrate(velocity, start, times, tolerance)


def _integrate(
    velocity: Callable[[FloatArray], FloatArray], start: FloatArray, times: FloatArray, tolerance: float
) -> FloatArray:
    moments, place = np.unique(times, return_inverse=True)
    if moments[-1] == 0:
        return np.repeat(start[None], len(times), 0)
    solution = solve_ivp(
        lambda _, position: velocity(position.reshape(start.shape)).ravel(),
        (0.0, float(moments[-1])),
        start.ravel(),
        method="DOP853",
        t_eval=moments,
        rtol=tolerance,
        atol=tolerance * 1e-3,
    )
    assert solution.success, solution.message
    return solution.y.T[place].reshape(len(times), *start.shape)


class FirstOrder(NamedTuple):
    """Growth of expected reward and KL at the start of training, for answers of any length; K behaviours.

    Attributes:
        behaviours: their names, K.
        reward_rate: d(expected reward)/dt at t = 0 along the gradient flow of J, shape (K,).
        kl_rate: KL(t)/t² as t → 0, nats, shape (K,).
    """

    behaviours: list[str]
    reward_rate: FloatArray
    kl_rate: FloatArray


def first_order(
    features: FloatArray, climbed: FloatArray, behaviour_of: np.ndarray, *, measured: FloatArray | None = None
) -> FirstOrder:
    """Growth rates from answers that were drawn from the reference, in pairs: y and y′ to the same prompt.

    With two answers a prompt, the leave-one-out policy gradient (Ahmadian et al., 2024, arXiv 2402.14740) of the prompt
    is g = ½ (r(y) − r(y′)) φ with φ = ∇ log π(y) − ∇ log π(y′), a preference pair's feature. Expected reward of
    behaviour k then grows with ⟨g_k, g⟩, g_k the mean over k's prompts and g over all; KL(t) is t²/4 times the mean of
    ⟨φ, g⟩² over k's prompts (half the Fisher norm; φ has twice the variance of one answer). Both are taken across two
    independent draws, so that the noise of an answer does not meet itself. The KL term has no gradient at the start: β
    does not matter.

    Args:
        features: φ of each prompt's two pairs, shape (2, n, dim).
        climbed: r(y) − r(y′) of the reward that is maximised, shape (2, n).
        behaviour_of: behaviour of each prompt, shape (n,).
        measured: r(y) − r(y′) of another reward whose growth is wanted, shape (2, n); None: the same.
    """
    whole = (
        0.5 * np.einsum("sn,snd->sd", climbed, features)[::-1] / len(behaviour_of)
    )  # each draw meets the other's mean
    moved = np.einsum("snd,sd->sn", features, whole)
    gains = (0.5 * (climbed if measured is None else measured) * moved).mean(0)
    names = [str(name) for name in np.unique(behaviour_of)]
    own = [behaviour_of == name for name in names]
    return FirstOrder(
        names,
        np.array([gains[members].mean() for members in own]),
        np.array([(moved[:, members] ** 2).mean() / 4 for members in own]),
    )
