"""Read one data file row by row, with an error that says where the file is broken.

A file is read again for every pass over its rows, so that its size does not matter; a JSON array alone is read whole.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from foretune.errors import UserError, first_line

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# Files that `datasets` and the hub write beside the data; their name ends like a data file but they hold no rows.
NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})

# Rows that can be passed over more than once.
Rows = Iterable[dict[str, Any]]
ROWS_AT_ONCE = 1000


def data_suffix(path: Path) -> str | None:
    """Return the kind of data file (".jsonl", …, looking through ".gz"), or None for any other file."""
    if path.name.lower() in NOT_DATA or path.name.startswith("."):
        return None
    suffix = Path(_unzipped_name(path)).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def data_stem(path: Path) -> str:
    """Return the file name without its data suffix and without ".gz"."""
    return Path(_unzipped_name(path)).stem


def read_rows(path: Path) -> Rows:
    """The rows of a .jsonl, .json, .parquet or .csv file (the text ones may be gzipped).

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is broken; names the file and the line or byte. What is
            broken within the rows is told by the first pass over them.
    """
    suffix = data_suffix(path)
    if suffix == ".parquet":
        return FileRows(path, _read_parquet)
    _check_text(path)
    if suffix == ".csv":
        return FileRows(path, _read_csv)
    if suffix == ".json" and _begins_array(path):
        return _read_json_array(path)
    return FileRows(path, _read_json_lines)


class FileRows:
    """Rows read from a file at every pass.

    Args:
        path: the file.
        read: yields its rows.
    """

    def __init__(self, path: Path, read: Callable[[Path], Iterator[dict[str, Any]]]) -> None:
        """Read nothing yet."""
        self._path, self._read = path, read

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One pass."""
        return self._read(self._path)


def without_nulls(value: Any) -> Any:
    """Drop None entries of nested dictionaries: Arrow writes them for keys that only other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def without_null_entries(row: dict[str, Any]) -> dict[str, Any]:
    """The same within the values of a row, which keeps its own None."""
    return {key: without_nulls(value) for key, value in row.items()}


def _unzipped_name(path: Path) -> str:
    return path.name[:-3] if _is_gzipped(path) else path.name


def _is_gzipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _open_binary(path: Path) -> BinaryIO:
    return gzip.open(path) if _is_gzipped(path) else path.open("rb")  # pyright: ignore[reportReturnType]


def _open_text(path: Path) -> io.TextIOWrapper:
    # newline "": CSV cells keep their line breaks; JSON lines are split at "\n" and a "\r" before it is white space
    return io.TextIOWrapper(_open_binary(path), encoding="utf-8-sig", newline="")


def _check_text(path: Path) -> None:
    """Read the file through once: it must be there, whole, and UTF-8."""
    offset = 0
    try:
        with _open_binary(path) as file:
            for line in file:
                line.decode("utf-8")
                offset += len(line)
    except UnicodeDecodeError as error:
        place = "unzipped byte" if _is_gzipped(path) else "byte"
        raise UserError(
            f"{path} is not UTF-8: {place} {offset + error.start} is 0x{error.object[error.start]:02x}; "
            "save the file as UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; check the file and its permissions.") from error


def _begins_array(path: Path) -> bool:
    with _open_text(path) as file:
        return next((line.lstrip()[0] for line in file if line.strip()), "") == "["


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open_binary(path) as file:
        # Not by text: that also splits at U+2028 and the like, which JSON strings may hold.
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number} is not valid JSON ({error}); put one object on each line."
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is a JSON {_json_kind(row)}; put one object on each line.")
            yield row


def _read_json_array(path: Path) -> list[dict[str, Any]]:
    try:
        with _open_text(path) as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno} is not valid JSON ({error.msg}); mend that line.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); write one object on each line instead.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {number} is a JSON {_json_kind(row)}; every entry must be an object.")
    return rows


def _json_kind(value: Any) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than one long dialogue
    with _open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{path}, line {reader.line_num} has more cells than the header; "
                        "quote the cells that hold commas."
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {error}; mend that line.") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from map(without_null_entries, batch.to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path} as Parquet: {first_line(error)}; check that the file is whole.") from error
