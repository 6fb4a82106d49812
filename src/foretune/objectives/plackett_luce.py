"""The Plackett–Luce likelihood of a whole ranking (Rafailov et al., 2023, arXiv 2305.18290, appendix A.3)."""

from foretune.objectives.ranking import StagedObjective


class PlackettLuce(StagedObjective):
    """ℓ(s) = −Σ_i log [e^{βs_i} / (e^{βs_i} + Σ_{j worse than i} e^{βs_j})]: DPO's of K responses.

    Tied responses do not compete: each is compared with the strictly worse ones alone (our choice; without ties it is
    the likelihood of the literature).

    >>> import numpy as np
    >>> ranks = np.array([1, 2, 3])
    >>> float(PlackettLuce(beta=0.1).value(np.zeros(3), ranks)).__round__(6)  # log 3!
    1.791759
    >>> PlackettLuce(beta=1.0).slopes(np.zeros(3), ranks).round(4).tolist()  # -2/3, 1/3 - 1/2, 1/3 + 1/2
    [-0.6667, -0.1667, 0.8333]
    """

    def stages(self, ranks):
        """All responses."""
        return ranks > 0
