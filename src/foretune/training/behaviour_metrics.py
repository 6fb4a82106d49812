"""Per-behaviour metrics from per-example values: kept as rows, aggregated once, with n."""

from collections.abc import Sequence

import torch
from torch import Tensor

REWARD_KEYS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
LOGP_KEYS = ("logps/chosen", "logps/rejected")
DISPLACEMENT_KEYS = ("displacement/chosen", "displacement/rejected")


def example_values(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """One row a pair, one column a metric (rewards, then log-probs, then displacement); all inputs of shape (n,)."""
    displacement = torch.stack([chosen - ref_chosen, rejected - ref_rejected], 1).float()
    rewards = beta * displacement
    margins = rewards[:, 0] - rewards[:, 1]
    return torch.cat(
        [
            rewards,
            (margins > 0).float()[:, None],
            margins[:, None],
            torch.stack([chosen, rejected], 1).float(),
            displacement,
        ],
        1,
    )


class BehaviourMetrics:
    """Sums and counts per behaviour between two logs."""

    def __init__(self) -> None:
        """Start empty."""
        self._keys = REWARD_KEYS + LOGP_KEYS + DISPLACEMENT_KEYS
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, behaviours: Sequence[str], values: Tensor) -> None:
        """Add examples: their behaviours, n of them, and values as of `example_values`."""
        for behaviour, row in zip(behaviours, values.detach().cpu().double(), strict=True):
            self._sums[behaviour] = self._sums.get(behaviour, torch.zeros_like(row)) + row
            self._counts[behaviour] = self._counts.get(behaviour, 0) + 1

    def summary(self) -> dict[str, float]:
        """Means under TRL's key + "/{behaviour}", displacement over all pairs too, and n per behaviour."""
        found: dict[str, float] = {}
        for behaviour in sorted(self._counts):
            means = self._sums[behaviour] / self._counts[behaviour]
            found |= {f"{key}/{behaviour}": float(mean) for key, mean in zip(self._keys, means, strict=True)}
            found[f"num_pairs/{behaviour}"] = float(self._counts[behaviour])
        if self._counts:
            means = torch.stack(list(self._sums.values())).sum(0) / sum(self._counts.values())
            found |= {key: float(means[self._keys.index(key)]) for key in DISPLACEMENT_KEYS}
        return found
