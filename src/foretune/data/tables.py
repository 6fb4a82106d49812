"""The `datasets` table of all usable rows, written block by block to a temporary file and mapped from there."""

import json
import math
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.data.formats import Triple
from foretune.data.pairs import Pair
from foretune.data.rankings import Ranking
from foretune.data.splits import stable_hash
from foretune.errors import UserError, first_line

if TYPE_CHECKING:
    import datasets
    import pyarrow
    from numpy.typing import NDArray

EXTRAS = ("tools", "chat_template_kwargs", "margin")
ROWS_AT_ONCE = 1000
# Their files are mapped by data sets that may live until the process ends.
_FOLDERS: list[tempfile.TemporaryDirectory] = []


class TableWriter:
    """Takes rows one by one; the table has the columns that `PreferenceData` documents."""

    def __init__(self) -> None:
        """Make the temporary folder."""
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="foretune-data-", ignore_cleanup_errors=True))
        self._folder = Path(_FOLDERS[-1].name)
        self._rows: list[dict[str, Any]] = []
        self._files: list[Path] = []
        self._stream: Any = None
        self._schema: Any = None
        self._extras: set[str] = set()
        self._counts = {"text": 0, "conversations": 0}

    def add(self, pair: Pair, found: Triple | Ranking, extras: dict[str, Any]) -> None:
        """Add one row, or the contrasts of a ranking one after the other."""
        self._counts["conversations" if isinstance(found.prompt, list) else "text"] += 1
        self._extras |= {name for name in EXTRAS if extras.get(name)}
        common = {
            "behaviour": pair.behaviour,
            "weight": pair.weight,
            "tools": _as_json(extras.get("tools")),
            "chat_template_kwargs": extras.get("chat_template_kwargs") or {},
            "margin": _number(extras.get("margin")),
        }
        if isinstance(found, Ranking):
            for place, (triple, rank) in enumerate(zip(found.contrasts(), found.ranks, strict=False)):
                ranked = {"ranking": pair.pair_id, "chosen_rank": rank, "rejected_rank": found.ranks[-1]}
                self._append({"pair_id": stable_hash(pair.pair_id, place), **triple._asdict(), **common, **ranked})
        else:
            self._append({"pair_id": pair.pair_id, **found._asdict(), **common})

    def _append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == ROWS_AT_ONCE:
            self._write()

    def finish(self) -> "datasets.Dataset":
        """All rows in their order.

        Raises:
            UserError: some rows are text and others conversations, or messages of one key differ in type.
        """
        import datasets

        _check_one_kind(self._counts)
        self._write()
        self._stream.close()
        file = self._files[0] if len(self._files) == 1 else self._joined()
        table = datasets.Dataset.from_file(str(file))
        return table.remove_columns([name for name in EXTRAS if name not in self._extras])

    def _write(self) -> None:
        """Write a block; one whose messages have other keys begins a new file."""
        import pyarrow

        rows, self._rows = self._rows, []
        if not rows or all(self._counts.values()):
            return  # `finish` will refuse a mixture of both
        with _one_type():
            block = pyarrow.table({name: _column(name, rows) for name in rows[0]})
        if block.schema != self._schema:
            if self._stream is not None:
                self._stream.close()
            self._files.append(self._folder / f"rows-{len(self._files)}.arrow")
            self._stream = pyarrow.ipc.new_stream(str(self._files[-1]), block.schema)
            self._schema = block.schema
        self._stream.write_table(block)

    def _joined(self) -> Path:
        """One file of all, in which a message has the keys of every file."""
        import pyarrow

        with _one_type():
            schemas = [pyarrow.ipc.open_stream(str(file)).schema for file in self._files]
            schema = pyarrow.unify_schemas(schemas, promote_options="permissive")
            with pyarrow.ipc.new_stream(str(self._folder / "rows.arrow"), schema) as stream:
                for file in self._files:
                    for batch in pyarrow.ipc.open_stream(str(file)):
                        stream.write_table(pyarrow.Table.from_pylist(batch.to_pylist(), schema=schema))
                    file.unlink()
        return self._folder / "rows.arrow"


@contextmanager
def _one_type() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise UserError(
            f"the rows do not fit one table: {first_line(error)}; give each key of messages one type."
        ) from error


def _check_one_kind(counts: dict[str, int]) -> None:
    """No template fits both texts and conversations."""
    if all(counts.values()):
        raise UserError(
            f"{counts['conversations']} rows are conversations and {counts['text']} are text; "
            "load them as two data sets."
        )


def columns_of(rows: "datasets.Dataset", names: Sequence[str]) -> "dict[str, NDArray]":
    """Columns of numbers, read in blocks: of a selection of rows, `datasets` would gather all columns at one time."""
    import numpy as np

    blocks: list[Any] = [*rows.select_columns([*names]).with_format("arrow").iter(ROWS_AT_ONCE)]
    return {name: np.concatenate([block[name].to_numpy() for block in blocks]) for name in names}


def opened_anew(rows: "datasets.Dataset") -> "datasets.Dataset":
    """The same rows, mapped once more: what is read of a file stays resident until the mapping is dropped."""
    return pickle.loads(pickle.dumps(rows)) if rows.cache_files else rows


def _column(name: str, rows: list[dict[str, Any]]) -> "pyarrow.Array":
    import pyarrow

    types = {"tools": pyarrow.string(), "margin": pyarrow.float64()}
    return pyarrow.array([row[name] for row in rows], type=types.get(name))


def _number(value: Any) -> float | None:
    """A row's margin; None for what is no finite number: reward models refuse it, others do not read the column."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def _as_json(tools: Any) -> str | None:
    # As text, because Arrow would give every tool the keys of all the others; TRL reads text as JSON.
    if tools is None or isinstance(tools, str):
        return tools or None
    return json.dumps(tools)
