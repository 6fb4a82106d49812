"""What became of every row: counts per behaviour and split, and the first faults."""

from collections import Counter
from typing import Any

from foretune.data.pairs import Pairs

TRAIN, TEST = "train", "test"
COUNTS = ("read", "kept", "empty", "identical", "malformed", "leaked", "duplicates", "surplus")


class Account:
    """Counts what was read, kept and dropped; `first_malformed` tells the first broken row."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._counts: dict[tuple[str, str], Counter[str]] = {}
        self.first_malformed: str | None = None

    def add(self, behaviour: str, split: str, *what: str, rows: int = 1) -> None:
        """Count rows of this behaviour and split under each name in `what` (see COUNTS)."""
        counts = self._counts.setdefault((behaviour, split), Counter())
        for name in what:
            counts[name] += rows

    def add_all(self, pairs: Pairs, split: str, what: str) -> None:
        """Count all of these pairs under one name."""
        for behaviour, rows in pairs.groups():
            self.add(behaviour, split, what, rows=len(rows))

    def move_read(self, pairs: Pairs) -> None:
        """Count pairs that were read as training as ones of the made test split."""
        for behaviour, rows in pairs.groups():
            self.add(behaviour, TRAIN, "read", rows=-len(rows))
        self.add_all(pairs, TEST, "read")

    def total(self, what: str) -> int:
        """Return one count over all behaviours and splits."""
        return sum(counter[what] for counter in self._counts.values())

    def dropped(self) -> str:
        """Return why rows were dropped, such as "3 empty, 1 malformed"."""
        reasons = [f"{self.total(name)} {name}" for name in ("empty", "identical", "malformed") if self.total(name)]
        return ", ".join(reasons)

    def behaviours(self) -> list[str]:
        """Return the names of behaviours with kept rows, sorted."""
        return sorted({behaviour for (behaviour, _), counter in self._counts.items() if counter["kept"]})

    def without_training(self) -> list[str]:
        """Return the behaviours that have test rows but no training rows, sorted."""
        return [name for name in self.behaviours() if not self._counts.get((name, TRAIN), Counter())["kept"]]

    def rows(self) -> list[dict[str, Any]]:
        """Return one dictionary per behaviour and split, sorted, train before test."""
        order = sorted(self._counts, key=lambda key: (key[0], key[1] != TRAIN))
        return [
            {"behaviour": behaviour, "split": split} | {name: self._counts[behaviour, split][name] for name in COUNTS}
            for behaviour, split in order
        ]
