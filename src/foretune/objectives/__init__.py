"""Losses of a preference margin, as data: value ℓ, slope ℓ′ and curvature ℓ″."""

from foretune.objectives.base import Objective
from foretune.objectives.bradley_terry import BradleyTerry
from foretune.objectives.dpo import DPO
from foretune.objectives.ipo import IPO
from foretune.objectives.slic import SLiC

__all__ = ["DPO", "IPO", "BradleyTerry", "Objective", "SLiC"]
