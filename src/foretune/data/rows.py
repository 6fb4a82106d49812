"""From raw rows to pairs: the format, the behaviour, the weight and the checks, row by row."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from foretune.data.accounts import Account
from foretune.data.behaviours import Naming, check_wanted
from foretune.data.checks import Fault, check_weight, is_encodable, template_fault
from foretune.data.formats import RANKING, UNPAIRED, Triple, layout, read_pair, refine
from foretune.data.pairs import Pair, Pairs
from foretune.data.rankings import Ranking, read_ranking
from foretune.data.sources import Part
from foretune.data.splits import PairMaker
from foretune.data.tables import EXTRAS, TableWriter
from foretune.errors import UserError

DEFAULT_WEIGHT_COLUMN = "weight"
NAMELESS = Fault("malformed", "its behaviour's name holds half of a surrogate pair, which is no valid text")


def common_format(parts: Sequence[Part]) -> str:
    """Return the one format that all parts have.

    Raises:
        UserError: a part has no known format, or two parts differ.
    """
    layouts = [layout(part.columns, source=part.label) for part in parts]
    for part, found in zip(parts, layouts, strict=True):
        if found != layouts[0]:
            raise UserError(
                f"{parts[0].label} holds rows of format '{layouts[0]}' but {part.label} of format '{found}'; "
                "load them one by one."
            )
    return refine(layouts[0], [row for part in parts for row in islice(part.rows, 1000)])


class RowReader:
    """Turns parts into pairs and enters every row in the account."""

    def __init__(
        self,
        *,
        format: str,
        naming: Naming,
        weight_column: str,
        behaviours: Sequence[str] | None,
        account: Account,
        seed: int,
    ) -> None:
        """Keep what does not change from row to row; `behaviours` None takes all of them."""
        self.table = TableWriter()
        self._maker = PairMaker(seed)
        self._format = format
        self._naming = naming
        self._weight_column = weight_column
        self._wanted = None if behaviours is None else set(behaviours)
        self._account = account
        self.found: set[str] = set()
        self.missing_weights = 0
        self.labels = {"desirable": 0, "undesirable": 0}

    def read(self, parts: Sequence[Part], split: str) -> Pairs:
        """Return the usable rows of these parts in their order, as pairs of this split; their texts go to `table`."""
        pairs = (self._read_row(part, row, number, split) for part in parts for number, row in enumerate(part.rows))
        return Pairs.of(pair for pair in pairs if pair is not None).without_answers(self._maker.free_text())

    def _read_row(self, part: Part, row: dict[str, Any], number: int, split: str) -> Pair | None:
        name = self._naming.name(part, row)
        behaviour = name.encode("utf-8", "replace").decode()
        self.found.add(behaviour)
        if self._wanted is not None and behaviour not in self._wanted:
            return None
        place = f"row {number + 1} of {part.label}"
        weight = self._weight(part, row, place)
        result = self._read(part, row) if is_encodable(name) else NAMELESS
        if isinstance(result, Fault):
            self._account.add(behaviour, split, "read", result.kind)
            if result.kind == "malformed" and self._account.first_malformed is None:
                self._account.first_malformed = f"{place}: {result.reason}"
            return None
        self._account.add(behaviour, split, "read")
        if self._format == UNPAIRED:
            self.labels["desirable" if result.chosen else "undesirable"] += 1  # pyright: ignore
        pair = self._maker.pair(behaviour, result, weight)
        self.table.add(pair, result, _extras(part, row))
        return pair

    def _read(self, part: Part, row: dict[str, Any]) -> Triple | Ranking | Fault:
        ranked = self._format == RANKING
        found = read_ranking(row, part.columns) if ranked else read_pair(row, format=self._format)
        conversation = not isinstance(found, Fault) and isinstance(found.prompt, list)
        return (template_fault(_extras(part, row)) if conversation else None) or found

    def _weight(self, part: Part, row: dict[str, Any], place: str) -> float:
        weight = check_weight(row.get(self._weight_column), column=self._weight_column, place=place)
        if weight is not None:
            return weight
        self.missing_weights += self._weight_column in part.columns
        return 1.0


def _extras(part: Part, row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in EXTRAS if name in part.columns}


def check_weight_column(parts: Sequence[Part], column: str) -> None:
    """Raise a UserError when the user named a weight column that no part has."""
    if column != DEFAULT_WEIGHT_COLUMN and not any(column in part.columns for part in parts):
        found = ", ".join(parts[0].columns)
        raise UserError(f"no weight column '{column}': found {found}; pass one of them with --weight_column.")


def check_left(pairs: Pairs, *, reader: RowReader, behaviours: Sequence[str] | None, account: Account) -> None:
    """Raise a UserError when a wanted behaviour does not exist, or the usable training rows cannot be trained on."""
    if reader.found:
        check_wanted(behaviours or (), sorted(reader.found))
    if pairs:
        if not pairs.weight.any():
            raise UserError("the weights of all training rows are 0; give some rows a weight above 0.")
        found = [label for label, count in reader.labels.items() if count]
        if len(found) == 1:
            raise UserError(
                f"all {reader.labels[found[0]]} rows are {found[0]}: unpaired rows need both desirable and undesirable "
                "ones (label true and false); add the other kind, or use supervised fine-tuning."
            )
        return
    read, dropped = account.total("read"), account.dropped()
    if not read:
        raise UserError("the data has no rows; check the file and the split.")
    first = f"; the first malformed one is {account.first_malformed}" if account.first_malformed else ""
    raise UserError(f"no training rows are left of {read} rows read: {dropped or 'all of them are test rows'}{first}.")
