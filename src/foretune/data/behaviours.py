"""Which behaviour each row belongs to: a column, the file's name, or one behaviour for everything."""

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from foretune.data.sources import Part
from foretune.errors import UserError

BEHAVIOUR_COLUMNS = ("behaviour", "behavior", "category", "subset", "source", "channel", "task_name", "topic")
FILE_COLUMN = "file"  # the behaviour is the stem of the file's name
EVERYTHING = "everything"
NO_BEHAVIOUR = "(none)"


class Naming(NamedTuple):
    """`column` is None when everything is one behaviour; `name(part, row)` gives a row's behaviour."""

    column: str | None
    name: Callable[[Part, dict[str, Any]], str]
    notes: list[str]


def choose_naming(parts: Sequence[Part], *, column: str | None, is_persona: bool) -> Naming:
    """Decide where behaviours come from.

    An explicit column wins; then the file names of persona files; then the first of BEHAVIOUR_COLUMNS that every part
    has and whose values are names; then the file names where there are several files; else everything is one behaviour.

    Raises:
        UserError: the explicit column is missing or does not hold names.
    """
    columns = _shared_columns(parts)
    stems = {part.stem for part in parts}
    has_stems = None not in stems
    if column is not None and (column in columns or not (column == FILE_COLUMN and has_stems)):
        _check_column(parts, column, columns)
        return _by_column(column)
    if column == FILE_COLUMN or (is_persona and has_stems):
        return _by_file()
    notes = []
    for candidate in (name for name in BEHAVIOUR_COLUMNS if name in columns):
        reason = _unfit(parts, candidate)
        if reason is None:
            return _by_column(candidate)
        notes.append(f"Column '{candidate}' was not taken for the behaviour: {reason}.")
    if has_stems and len(stems) > 1:
        return _by_file(notes)
    found = ", ".join(columns)
    notes.append(
        f"No behaviour column found among {found}: everything is one behaviour, called '{EVERYTHING}'. "
        "Pass --behaviour_column to name one."
    )
    return Naming(None, lambda part, row: EVERYTHING, notes)


def check_wanted(wanted: Sequence[str], found: Sequence[str]) -> None:
    """Raise a UserError, with the nearest names, when a wanted behaviour is not among those found."""
    for name in wanted:
        if name not in found:
            nearest = difflib.get_close_matches(name, found, n=3, cutoff=0.4) or sorted(found)[:3]
            raise UserError(f"no behaviour '{name}' in the data; the nearest names are {', '.join(nearest)}.")


def _by_column(column: str) -> Naming:
    return Naming(column, lambda part, row: _as_name(row.get(column)), [])


def _by_file(notes: Sequence[str] = ()) -> Naming:
    return Naming(FILE_COLUMN, lambda part, row: str(part.stem), list(notes))


def _as_name(value: Any) -> str:
    name = "" if value is None else str(value).strip()
    return name or NO_BEHAVIOUR


def _shared_columns(parts: Sequence[Part]) -> list[str]:
    return [column for column in parts[0].columns if all(column in part.columns for part in parts[1:])]


def _check_column(parts: Sequence[Part], column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        where = [part.label for part in parts if column not in part.columns]
        place = f" in {where[0]}" if len(where) < len(parts) else ""
        raise UserError(
            f"no behaviour column '{column}'{place}: found {', '.join(columns)}; "
            "pass one of them with --behaviour_column."
        )
    if not _holds_names(parts, column):
        raise UserError(f"behaviour column '{column}' does not hold names (text or numbers); pass another column.")


def _holds_names(parts: Sequence[Part], column: str) -> bool:
    return not any(isinstance(row.get(column), (list, dict)) for part in parts for row in part.rows)


def _unfit(parts: Sequence[Part], column: str) -> str | None:
    """Return why a column that nobody asked for is no behaviour column, or None when it is one."""
    if not _holds_names(parts, column):
        return "it does not hold text or numbers"
    values = Counter(_as_name(row.get(column)) for part in parts for row in part.rows)
    if len(values) > max(20, values.total() / 2):  # such as a `source` that gives each row's address
        return f"it has {len(values)} different values in {values.total()} rows"
    return None
