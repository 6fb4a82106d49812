"""The best of K responses against all others: softmax cross-entropy (the first stage of Plackett–Luce)."""

from foretune.objectives.ranking import StagedObjective


class TopOne(StagedObjective):
    """ℓ(s) = −log [e^{βs_1} / (e^{βs_1} + Σ_{j worse} e^{βs_j})]; the mean of it where several are tied for best.

    Those tied for best do not compete with each other.

    >>> import numpy as np
    >>> ranks = np.array([1, 2, 3])
    >>> float(TopOne(beta=0.1).value(np.zeros(3), ranks)).__round__(6)  # log 3
    1.098612
    >>> TopOne(beta=1.0).slopes(np.zeros(3), ranks).round(4).tolist()
    [-0.6667, 0.3333, 0.3333]
    """

    def stages(self, ranks):
        """The best ones."""
        none_better = ((ranks[..., None, :] == 0) | (ranks[..., None, :] >= ranks[..., :, None])).all(-1)
        return none_better & (ranks > 0)

    @property
    def averaged(self) -> bool:
        """The best ones share one stage."""
        return True
