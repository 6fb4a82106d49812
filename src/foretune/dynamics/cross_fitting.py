"""Simulated runs of which each pair's margin is read where the pair does not stand for others.

Where few measured pairs stand for many rows, a simulated run trains on each of them as often as on all the rows that
it stands for. It would learn them by heart, and its loss would forget them too early: real rows are seen once an
epoch. So the pairs that stand for others are halved, and two runs take the same batches, each with stand-ins of one
half. What a pair is worth to the loss, and what is recorded of it, is its margin in the run in which it does not stand
for others (cross-fitting; our own construction). Pairs that were measured train as themselves in both.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from foretune.features.coordinates import Coordinates

if TYPE_CHECKING:
    from foretune.dynamics.simulated_run import MarginModel

OTHER = "other_half."


class CrossFitted:
    """One run, or two halves of one; the parameters of the second are named `OTHER` and their own names.

    Args:
        model: margins; a second row of its `place` says what stands for the pairs in the second half.

    Attributes:
        halves: the margins with the stand-ins of each half.
    """

    def __init__(self, model: "MarginModel") -> None:
        """Find out which pairs stand for others."""
        self.halves, self._stands = [model], []
        if model.place is not None and len(model.place) > 1:
            place = self._place = model.place
            self.halves = [model._replace(place=place[[half]]) for half in (0, 1)]  # pyright: ignore
            used = [np.isin(np.arange(place.max() + 1), place[half][place[0] != place[1]]) for half in (0, 1)]
            self._stands = [torch.from_numpy(used[half] & ~used[1 - half]) for half in (0, 1)]

    @property
    def sampled(self) -> Mapping[str, Coordinates]:
        """As of `MarginModel`, of all parameters."""
        return self._of_all(self.halves[0].sampled)

    @property
    def decayed(self) -> Collection[str] | None:
        """As of `MarginModel`, of all parameters."""
        decayed = self.halves[0].decayed
        return None if decayed is None else [*self._of_all(dict.fromkeys(decayed))]

    def start(self) -> dict[str, Tensor]:
        """Of all parameters."""
        return self._of_all(self.halves[0].start())

    def _of_all(self, named: Mapping[str, object]) -> dict:
        return {prefix + name: value for prefix in ("", OTHER)[: len(self.halves)] for name, value in named.items()}

    def split(self, parameters: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """The parameters of each half, by their own names."""
        if len(self.halves) == 1:
            return [parameters]
        first = {name: value for name, value in parameters.items() if not name.startswith(OTHER)}
        return [first, {name: parameters[OTHER + name] for name in first}]

    def centre(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Between the halves."""
        first, *others = self.split(parameters)
        return {name: (value + others[0][name]) / 2 for name, value in first.items()} if others else first

    def trained(self, parameters: Mapping[str, Tensor], pairs: Tensor, half: int) -> Tensor:
        """Margins that a half trains on, shape (len(pairs),): values where no pair stands for others, its gradients."""
        own, *others = (split := self.split(parameters))[half:] + split[:half]
        margins = self.halves[half].margins(own, pairs, training=True)
        if not others:
            return margins
        crossed = self._stands[half][self._place[half][pairs.numpy()]]
        if crossed.any():
            with torch.no_grad():
                elsewhere = self.halves[half].margins(others[0], pairs[crossed], training=True)
                there = crossed.to(margins.device)
                shift = torch.zeros_like(margins).masked_scatter(there, elsewhere - margins[there])
            margins = margins + shift
        return margins

    def observed(self, parameters: Mapping[str, Tensor], pairs: Tensor) -> Tensor:
        """Margins of some measured pairs, shape (len(pairs),): where they stand for none, the mean of both halves."""
        margins = [self.halves[0].margins(own, pairs) for own in self.split(parameters)]
        if len(margins) == 1:
            return margins[0]
        first, second = (stands[self._place[0][pairs.numpy()]].to(margins[0].device) for stands in self._stands)
        return torch.where(first, margins[1], torch.where(second, margins[0], (margins[0] + margins[1]) / 2))
