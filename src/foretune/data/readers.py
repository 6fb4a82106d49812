"""Read one data file into rows, with an error that says where the file is broken."""

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from foretune.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# Files that `datasets` and the hub write beside the data; their name ends like a data file but they hold no rows.
NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})

Rows = list[dict[str, Any]]


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
    """Read every row of a .jsonl, .json, .parquet or .csv file (the text ones may be gzipped).

    Raises:
        UserError: the file cannot be read, is not UTF-8, or is broken; names the file and the line or byte.
    """
    suffix = data_suffix(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if suffix == ".csv":
        return _read_csv(text, path)
    if suffix == ".json" and text.lstrip().startswith("["):
        return _read_json_array(text, path)
    return _read_json_lines(text, path)


def without_nulls(value: Any) -> Any:
    """Drop None entries of nested dictionaries: Arrow writes them for keys that only other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def _unzipped_name(path: Path) -> str:
    return path.name[:-3] if path.name.lower().endswith(".gz") else path.name


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; check the file and its permissions.") from error
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = "unzipped byte" if path.name.lower().endswith(".gz") else "byte"
        raise UserError(
            f"{path} is not UTF-8: {place} {error.start} is 0x{raw[error.start]:02x}; save the file as UTF-8."
        ) from error


def _read_json_lines(text: str, path: Path) -> Rows:
    rows = []
    # Not str.splitlines: that also splits at U+2028 and the like, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is not valid JSON ({error}); put one object on each line."
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is a JSON {_json_kind(row)}; put one object on each line.")
        rows.append(row)
    return rows


def _read_json_array(text: str, path: Path) -> Rows:
    try:
        rows = json.loads(text)
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


def _read_csv(text: str, path: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than one long dialogue
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path}, line {reader.line_num} has more cells than the header; quote the cells that hold commas."
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {error}; mend that line.") from error
    return rows


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"cannot read {path} as Parquet: {first_line}; check that the file is whole.") from error
