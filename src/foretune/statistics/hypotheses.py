"""Results that say which of their hypotheses fail on the data that they are computed from."""

from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class Checked(NamedTuple, Generic[Value]):
    """A value and the hypotheses under which it is stated that the data do not meet.

    Attributes:
        value: computed all the same.
        failed: what does not hold, each in words; empty where all that can be checked holds.

    >>> Checked(0.9, ("classes are unbalanced: 80 % prefer one answer",)).holds
    False
    """

    value: Value
    failed: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether no hypothesis was found to fail."""
        return not self.failed
