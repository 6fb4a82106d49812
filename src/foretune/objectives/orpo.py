"""Odds Ratio Preference Optimization (Hong et al., 2024, arXiv 2403.07691)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foretune.objectives.base import FloatArray
from foretune.objectives.dpo import DPO
from foretune.objectives.sided import SidedObjective

if TYPE_CHECKING:
    from torch import Tensor

ODDS_RATIO = DPO(beta=1.0)


@dataclass(frozen=True, kw_only=True)
class ORPO(SidedObjective):
    """−c − λ log σ(o(c) − o(r)), o(x) = x − log(1 − eˣ) the log-odds; c and r < 0 are log-probabilities per token.

    No reference. TRL's likelihood term is taken over prompt and response, the paper's over the response.

    Attributes:
        strength: λ (TRL's `beta`).
        likelihood: weight of −c, 1 in the paper; 0 leaves the odds ratio alone.

    >>> float(ORPO(strength=1.0).value(-1.0, -1.0)).__round__(6)
    1.693147
    """

    strength: float = 0.1
    likelihood: float = 1.0

    def value(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """−c − λ log σ(o(c) − o(r))."""
        odds = ODDS_RATIO.value(_log_odds(chosen) - _log_odds(rejected))
        return self.strength * odds - self.likelihood * np.asarray(chosen)

    def slopes(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """λ ℓ′ (o′(c), −o′(r)) − (1, 0); o′ = 1/(1 − eˣ)."""
        pull = self.strength * ODDS_RATIO.slope(_log_odds(chosen) - _log_odds(rejected))
        return np.stack([pull * _odds_slope(chosen) - self.likelihood, -pull * _odds_slope(rejected)])

    def curvature(self, chosen: FloatArray, rejected: FloatArray) -> FloatArray:
        """λ (ℓ″ of the outer product of (o′(c), −o′(r)), and ℓ′ (o″(c), −o″(r)) on the diagonal); o″ = o′² eˣ."""
        margin = _log_odds(chosen) - _log_odds(rejected)
        pull, bend = self.strength * ODDS_RATIO.slope(margin), self.strength * ODDS_RATIO.curvature(margin)
        first, second = _odds_slope(chosen), -_odds_slope(rejected)
        mixed = bend * first * second
        return np.stack(
            [
                np.stack([first**2 * (bend + pull * np.exp(chosen)), mixed]),
                np.stack([mixed, second**2 * (bend - pull * np.exp(rejected))]),
            ]
        )

    def torch_value(self, chosen: "Tensor", rejected: "Tensor") -> "Tensor":
        """The same on tensors."""
        odds = [side - (-side.expm1()).log() for side in (chosen, rejected)]
        return self.strength * ODDS_RATIO.torch_value(odds[0] - odds[1]) - self.likelihood * chosen


def _log_odds(score: FloatArray) -> FloatArray:
    return score - np.log(-np.expm1(score))


def _odds_slope(score: FloatArray) -> FloatArray:
    return -1.0 / np.expm1(score)
