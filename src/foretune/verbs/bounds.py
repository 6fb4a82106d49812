"""Bounds of arguments that are numbers: what lies beyond is told before any work."""

from collections.abc import Callable, Mapping
from math import inf, isfinite
from typing import Any, NamedTuple

from foretune.errors import UserError


class Bound(NamedTuple):
    """What a number must be.

    Attributes:
        holds: whether a number is so; never of NaN.
        words: the same after "it must".
    """

    holds: Callable[[float], bool]
    words: str


def at_least(least: int) -> Bound:
    """Numbers from `least` on."""
    return Bound(lambda value: least <= value < inf, f"be at least {least}")


SHARE = Bound(lambda value: 0 < value <= 1, "be above 0 and at most 1")
POSITIVE = Bound(lambda value: 0 < value < inf, "be above 0")

_COUNTS = (
    *("draws", "sketch_dim", "factor_rank", "lora_r", "twin_coordinates", "max_length"),
    *("observe_pairs", "twin_pairs", "audit_pairs", "per_device_train_batch_size", "gradient_accumulation_steps"),
)
BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(_COUNTS, at_least(1)),
    "observations": at_least(2),
    "relinearise_every": at_least(0),
    "relinearise_tolerance": POSITIVE,
    "pilot_fraction": Bound(lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    "lora_dropout": Bound(lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    "alone_mass": SHARE,
    "num_train_epochs": POSITIVE,
    "learning_rate": Bound(lambda value: isfinite(value) and value >= 0, "be a finite number of at least 0"),
    "seed": Bound(lambda value: 0 <= value < 2**32, "be at least 0 and below 2**32"),
}


def check_bounds(values: Mapping[str, Any]) -> None:
    """Refuse numbers with which nothing sensible can be computed.

    Raises:
        UserError: such an argument.
    """
    counts_steps = (values.get("max_steps") or 0) > 0
    for name, bound in BOUNDS.items():
        value = values.get(name)
        if value is None or bound.holds(value) or (name == "num_train_epochs" and counts_steps):
            continue
        raise UserError(f"{name} is {value}: it must {bound.words}.")
