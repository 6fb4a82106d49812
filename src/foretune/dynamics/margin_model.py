"""Margins of pairs as a known function of what is trained: what a simulated run steps on."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretune.features.coordinates import Coordinates

PAIRS_AT_ONCE = 16


class MarginModel(Protocol):
    """Margins of pairs, against the reference, as a function of the trainable parameters.

    For a sided loss of n pairs it knows 2n of them: n + i is the chosen score of pair i, its margin over an empty
    response.
    """

    @property
    def sampled(self) -> Mapping[str, Coordinates]:
        """Of those parameters that are there in part: which of the real one's coordinates, and what each stands for."""
        ...

    @property
    def decayed(self) -> Collection[str] | None:
        """Names of the parameters that weight decay acts on; None: their names say so."""
        ...

    def start(self) -> dict[str, Tensor]:
        """The parameters before the first step, in the real model's order and by its names."""
        ...

    def margins(self, parameters: Mapping[str, Tensor], pairs: Tensor, *, training: bool = False) -> Tensor:
        """Margins of some pairs, shape (len(pairs),), differentiable; `training`: with the run's dropout."""
        ...


NO_PAIRS = np.empty(0, dtype=np.int64)


class Looked(NamedTuple):
    """Pairs without features that the model itself scored at an anchor.

    Attributes:
        pairs: which, in ascending order, shape (k,).
        margins: theirs against the reference, of a sided loss their chosen scores after them; shape (k,) or (2k,).
    """

    pairs: NDArray[np.int64] = NO_PAIRS
    margins: NDArray[np.float64] = np.empty(0)


class Anchored(MarginModel, Protocol):
    """Margins in first order around parameters where the features of some pairs were taken."""

    @property
    def place(self) -> NDArray[np.int64]:
        """The measured pair that each pair is, or that stands for it, shape (n,)."""
        ...

    @property
    def looked(self) -> Looked:
        """Pairs without features, and what the model made of them there."""
        ...

    def shifted(self, gap: Tensor) -> "Anchored":
        """The same with margins of the measured pairs that are so much greater, shape (m,)."""
        ...


@torch.no_grad()
def all_margins(model: MarginModel, parameters: Mapping[str, Tensor], pairs: NDArray[np.int64]) -> Tensor:
    """Margins of some pairs, a few at a time, shape (len(pairs),); those of a stand-in are computed once."""
    place = getattr(model, "place", None)
    _, first, back = np.unique(pairs if place is None else place[pairs], return_index=True, return_inverse=True)
    parts = torch.as_tensor(pairs[first]).split(PAIRS_AT_ONCE)
    return torch.cat([model.margins(parameters, part) for part in parts])[torch.from_numpy(back)]


# (steps done, parameters now) → margins around another anchor from here on, or None
Renewal = Callable[[int, Mapping[str, Tensor]], Anchored | None]


def taken_up(anchored: Anchored, before: MarginModel, parameters: Mapping[str, Tensor]) -> Anchored:
    """Margins around another anchor, halfway between what they have come to before it and what is found there.

    With stale features the weights leave the real run's way: what is found there falls short of what the run has
    gained, and what was extrapolated knows nothing of how features have turned. The real gain lies halfway where they
    grow as much as they turn (our own derivation, docs/theory.md; measured in design/twin.md).
    """
    pairs = np.unique(anchored.place, return_index=True)[1]
    gap = all_margins(before, parameters, pairs) - all_margins(anchored, parameters, pairs)
    return anchored.shifted(gap / 2)
