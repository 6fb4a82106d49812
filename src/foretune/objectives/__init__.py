"""Losses of preferences, as data: value ℓ, slope ℓ′ and curvature ℓ″ of a margin, or of several scores."""

from foretune.objectives.apo import apo_down, apo_zero
from foretune.objectives.base import Objective
from foretune.objectives.bco import bco
from foretune.objectives.beta_dpo import BetaDPO
from foretune.objectives.bradley_terry import BradleyTerry
from foretune.objectives.contrasts import Contrasts, RankingLoss
from foretune.objectives.cpo import cpo
from foretune.objectives.discopop import DiscoPOP
from foretune.objectives.dpo import DPO
from foretune.objectives.dpo_positive import DPOPositive
from foretune.objectives.exo import EXO
from foretune.objectives.ipo import IPO
from foretune.objectives.kto import kto_pair, unpaired_order
from foretune.objectives.likelihood import NegativeLogLikelihood
from foretune.objectives.nca import nca
from foretune.objectives.noisy_labels import LabelSmoothed, Robust
from foretune.objectives.orpo import ORPO
from foretune.objectives.pairwise import Pairwise
from foretune.objectives.plackett_luce import PlackettLuce
from foretune.objectives.ranking import RankingObjective
from foretune.objectives.saturating import Saturating
from foretune.objectives.shifted import Shifted
from foretune.objectives.sided import SidedLoss, SidedObjective, SumOfTerms, Term
from foretune.objectives.simpo import simpo
from foretune.objectives.slic import SLiC
from foretune.objectives.sppo import sppo_hard
from foretune.objectives.top_one import TopOne
from foretune.objectives.unpaired import Unpaired
from foretune.objectives.wpo import wpo_weights

# What n pairs can be trained with.
LossOfPairs = Objective | RankingLoss | SidedLoss

__all__ = [
    "DPO",
    "EXO",
    "IPO",
    "ORPO",
    "BetaDPO",
    "BradleyTerry",
    "Contrasts",
    "DPOPositive",
    "DiscoPOP",
    "LabelSmoothed",
    "LossOfPairs",
    "NegativeLogLikelihood",
    "Objective",
    "Pairwise",
    "PlackettLuce",
    "RankingLoss",
    "RankingObjective",
    "Robust",
    "SLiC",
    "Saturating",
    "Shifted",
    "SidedLoss",
    "SidedObjective",
    "SumOfTerms",
    "Term",
    "TopOne",
    "Unpaired",
    "apo_down",
    "apo_zero",
    "bco",
    "cpo",
    "kto_pair",
    "nca",
    "simpo",
    "sppo_hard",
    "unpaired_order",
    "wpo_weights",
]
