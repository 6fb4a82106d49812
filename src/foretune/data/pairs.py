"""Many pairs in some forty bytes each: columns of numbers instead of objects."""

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Couple = tuple[str, str]


class Pair(NamedTuple):
    """What is kept in memory of one usable row, a pair or a ranking; its texts are in a table.

    Attributes:
        behaviour: its behaviour.
        weight: its weight.
        pair_id: a hash of behaviour, triple and how often that has occurred before.
        prompt_key: a hash of prompt and seed, which decides what is held out.
        key: a hash of the triple.
        answers: chosen and rejected; None where they are conversations, free text, a ranking or not both there.
    """

    behaviour: str
    weight: float
    pair_id: int
    prompt_key: int
    key: int
    answers: Couple | None


@dataclass(frozen=True, eq=False)
class Pairs(Sequence[Pair]):
    """The attributes of N pairs, each of shape (N,); behaviours and answers as places in `names` and `couples`."""

    behaviour: NDArray[np.int32]
    weight: NDArray[np.float64]
    pair_id: NDArray[np.int64]
    prompt_key: NDArray[np.int64]
    key: NDArray[np.int64]
    answers: NDArray[np.int32]
    names: list[str]
    couples: list[Couple | None]

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> Self:
        """All of them, read once."""
        columns = [array(kind) for kind in "idqqqi"]
        names: dict[str, int] = {}
        couples: dict[Couple | None, int] = {None: 0}
        for pair in pairs:
            name = names.setdefault(pair.behaviour, len(names))
            couple = couples.setdefault(pair.answers, len(couples))
            for column, value in zip(columns, (name, *pair[1:-1], couple), strict=True):
                column.append(value)
        arrays = dict(zip(Pair._fields, map(np.array, columns), strict=True))
        return cls(**arrays, names=[*names], couples=[*couples])

    def __len__(self) -> int:
        """How many."""
        return len(self.pair_id)

    def __getitem__(self, index: Any) -> Any:
        """The pair at a place, or the pairs at several (a slice, or an array of places or of truths)."""
        found = {name: getattr(self, name)[index] for name in Pair._fields}
        if not isinstance(index, int | np.integer):
            return replace(self, **found)
        pair = {name: value.item() for name, value in found.items()}
        return Pair(**pair | {"behaviour": self.names[pair["behaviour"]], "answers": self.couples[pair["answers"]]})

    def without_answers(self, behaviours: Collection[str]) -> Self:
        """The same, with no answers for these behaviours."""
        forgotten = np.array([name in behaviours for name in self.names], dtype=bool)[self.behaviour]
        return replace(self, answers=np.where(forgotten, self.couples.index(None), self.answers))

    def groups(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Each behaviour that has pairs, sorted by name, with their places."""
        order = np.argsort(self.behaviour, kind="stable")
        bounds = np.searchsorted(self.behaviour, np.arange(len(self.names) + 1), sorter=order)
        for code in sorted(range(len(self.names)), key=self.names.__getitem__):
            if bounds[code] < bounds[code + 1]:
                yield self.names[code], order[bounds[code] : bounds[code + 1]]
