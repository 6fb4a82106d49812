"""Objectives on rows of one response each, desirable or not (KTO's kind of data)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from foretune.errors import UserError
from foretune.objectives.base import FloatArray
from foretune.objectives.sided import SumOfTerms

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Unpaired:
    """A sided objective whose terms know one side each: a desirable row is a chosen response, any other a rejected one.

    >>> from foretune.objectives import kto_pair
    >>> Unpaired(kto_pair(beta=0.1)).value(np.array([0.0, 0.0]), np.array([True, False])).tolist()
    [0.5, 0.5]
    """

    pairs: SumOfTerms

    def __post_init__(self) -> None:
        """Refuse an objective that compares two responses."""
        if any(chosen and rejected for _, chosen, rejected, _ in self.pairs.terms):
            raise ValueError("an objective that compares both responses of a pair is not defined on unpaired rows.")

    def value(self, log_ratio: FloatArray, desirable: NDArray[np.bool_]) -> FloatArray:
        """Loss of each row, shape (n,).

        Args:
            log_ratio: log π(response) − log π_ref(response), shape (n,).
            desirable: shape (n,).

        Raises:
            UserError: rows of one kind alone.
        """
        return sum(
            w * loss.value((a + b) * log_ratio) * (desirable if a else ~desirable)
            for loss, a, b, w in self._terms(desirable)
        )  # pyright: ignore

    def torch_value(self, log_ratio: "Tensor", desirable: "Tensor") -> "Tensor":
        """`value` on tensors, of rows of any kinds."""
        first, *others = (
            w * loss.torch_value((a + b) * log_ratio) * (desirable if a else ~desirable)
            for loss, a, b, w in self.pairs.terms
        )
        return sum(others, first)

    def slope(self, log_ratio: FloatArray, desirable: NDArray[np.bool_]) -> FloatArray:
        """Derivative of each row's loss by its log-ratio, shape (n,); arguments and errors as of `value`."""
        return sum(
            w * (a + b) * loss.slope((a + b) * log_ratio) * (desirable if a else ~desirable)
            for loss, a, b, w in self._terms(desirable)
        )  # pyright: ignore

    def _terms(self, desirable: NDArray[np.bool_]) -> tuple:
        if desirable.all() or not desirable.any():
            kind = "desirable" if desirable.all() else "undesirable"
            raise UserError(
                f"all {len(desirable)} rows are {kind}: a loss of unpaired rows needs desirable and undesirable ones; "
                "add the other kind, or use supervised fine-tuning."
            )
        return self.pairs.terms
