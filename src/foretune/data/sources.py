"""Find the data that a name means: bundled, a file, a folder, a saved data set, or a data set of the hub."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foretune.data.readers import (
    ROWS_AT_ONCE,
    SUFFIXES,
    Rows,
    data_stem,
    data_suffix,
    read_rows,
    without_null_entries,
)
from foretune.errors import UserError, first_line

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_PREFIX = "bundled:"
# The words by which `datasets` tells splits from file names.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
# train-00000-of-00002-1a2b3c.parquet, test_2.jsonl
SHARD = re.compile(r"[-_.]\d+(-of-\d+(-[0-9a-f]+)?)?$")


@dataclass(frozen=True)
class Part:
    """The rows of one file, or of one split of a data set.

    `stem` is the behaviour that the file's name gives; None when the name is a split's or there is no file.
    """

    label: str
    stem: str | None
    columns: list[str]
    rows: Rows


@dataclass(frozen=True)
class Source:
    """Everything that was read. `splits` has the single key None when the source has no named splits."""

    splits: dict[str | None, list[Part]]
    notes: list[str] = field(default_factory=list)


def read_source(name: str, *, config: str | None, split_names: Sequence[str], wanted: Collection[str]) -> Source:
    """Read what `name` means.

    Args:
        name: "bundled:…", a path, or a name on the hub.
        config: the configuration of a hub data set, or None.
        split_names: the user's names for the train and test splits; files with these names are splits.
        wanted: columns to keep besides those of the known formats.

    Raises:
        UserError: there is no such data, or it cannot be read.
    """
    if not name.strip():
        raise UserError("the name of the data set is empty; pass a path or a name with --dataset_name.")
    if name.startswith(BUNDLED_PREFIX):
        return _read_folder(_bundled_folder(name), split_names)
    path = _as_path(name)
    if path.is_dir() and config is None:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _read_saved(path, wanted)
        return _read_folder(path, split_names)
    if path.is_file():
        return _read_file(path)
    if not path.exists() and _looks_like_path(name):
        raise UserError(f"no file or folder {name}; check the path given as --dataset_name.")
    return _read_hub(name, config, wanted)


def _as_path(name: str) -> Path:
    """The path that a name is where there is such a file.

    Raises:
        UserError: the home folder of nobody, a name longer than any, or a folder that must not be looked into.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        shown = name if len(name) <= 100 else name[:100] + "…"
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"'{shown}' cannot be looked up ({reason}); check the path given as --dataset_name.") from error
    return path


def _bundled_folder(name: str) -> Path:
    folder = BUNDLED / name.removeprefix(BUNDLED_PREFIX)
    known = sorted(f"{BUNDLED_PREFIX}{path.name}" for path in BUNDLED.iterdir() if path.is_dir())
    if f"{BUNDLED_PREFIX}{folder.name}" not in known or folder.parent != BUNDLED:
        raise UserError(f"no bundled data set '{name}'; the bundled ones are {', '.join(known)}.")
    return folder


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.lower().removesuffix(".gz").endswith(SUFFIXES)
    )


def _read_file(path: Path) -> Source:
    if data_suffix(path) is None:
        raise UserError(f"{path} is no data file; give a {', '.join(SUFFIXES)} file (text may be gzipped) or a folder.")
    return Source(splits={None: [_file_part(path, _behaviour_stem(path))]})


def _read_folder(folder: Path, split_names: Sequence[str]) -> Source:
    files = [path for place in (folder, folder / "data") for path in _data_files(place)]
    by_split = _subfolder_splits(folder, split_names)
    splits = _file_splits(files, split_names)
    for path, split in splits.items():
        by_split.setdefault(split, []).append(_file_part(path, None))
    if by_split:
        unused = ", ".join(path.name for path in files if path not in splits)
        notes = [f"Files whose names are not those of splits were left out: {unused}."] if unused else []
        return Source(splits=by_split, notes=notes)
    if not files:
        raise UserError(f"no data files in folder {folder}; it needs {', '.join(SUFFIXES)} files or a saved data set.")
    return Source(splits={None: [_file_part(path, _behaviour_stem(path)) for path in files]})


def _subfolder_splits(folder: Path, split_names: Sequence[str]) -> dict[str | None, list[Part]]:
    """Read folders called after splits; their files are behaviours when every split has files of the same names."""
    files: dict[str | None, list[Path]] = {}
    for place in (folder, folder / "data"):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            split = _exact_split(path.name, split_names) if path.is_dir() else None
            if split and _data_files(path):
                files.setdefault(split, []).extend(_data_files(path))
    agree = len({tuple(sorted(map(data_stem, paths))) for paths in files.values()}) == 1
    return {
        split: [_file_part(path, _behaviour_stem(path) if agree else None) for path in paths]
        for split, paths in files.items()
    }


def _behaviour_stem(path: Path) -> str | None:
    """Return the behaviour that a file name can give: not a split's name, and not just the number of a shard."""
    stem = re.sub(r"-\d+-of-\d+$", "", data_stem(path))
    is_number = re.fullmatch(r"(part|shard|chunk|data|file)?[-_.]?\d+", stem.lower())
    return None if is_number or _exact_split(stem, ()) else stem


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and data_suffix(path))


def _file_splits(files: Sequence[Path], split_names: Sequence[str]) -> dict[Path, str]:
    """Return the split of each file that belongs to one, by its name.

    Files called after a split (train.jsonl, test-00000-of-00002.parquet) decide. Failing those, names that begin or end
    with a split's word count, but only when every name does and they tell two splits at least: a behaviour may well be
    called "…-changed-by-training".
    """
    exact = {path: _exact_split(data_stem(path), split_names) for path in files}
    if any(exact.values()):
        return {path: split for path, split in exact.items() if split}
    worded = {path: _worded_split(data_stem(path)) for path in files}
    if all(worded.values()) and len(set(worded.values())) > 1:
        return {path: split for path, split in worded.items() if split}
    return {}


def _exact_split(name: str, split_names: Sequence[str]) -> str | None:
    for stem in (name, SHARD.sub("", name)):
        if stem in split_names:
            return stem
        if stem.lower() in SPLIT_WORDS:
            return SPLIT_WORDS[stem.lower()]
    return None


def _worded_split(stem: str) -> str | None:
    words = re.split(r"[-._ ]", SHARD.sub("", stem).lower())
    return SPLIT_WORDS.get(words[-1]) or SPLIT_WORDS.get(words[0])


def _file_part(path: Path, stem: str | None) -> Part:
    rows = read_rows(path)
    return Part(path.name, stem, list(dict.fromkeys(key for row in rows for key in row)), rows)


def _read_saved(folder: Path, wanted: Collection[str]) -> Source:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"cannot read the saved data set in {folder}: {first_line(error)}; save it again.") from error
    return Source(splits=_dataset_splits(loaded, str(folder), wanted))


def _read_hub(name: str, config: str | None, wanted: Collection[str]) -> Source:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # the hub client raises many kinds: offline, unknown, gated, unknown configuration
        told = f"'{name}'" if config is None else f"'{name}' with --dataset_config {config}"
        remedy = (
            "check the configuration" if Path(name).exists() else "check the name (no such path exists) and network"
        )
        raise UserError(f"cannot load data set {told}: {first_line(error)}; {remedy}.") from error
    return Source(splits=_dataset_splits(loaded, name, wanted))


def _dataset_splits(loaded: Any, label: str, wanted: Collection[str]) -> dict[str | None, list[Part]]:
    if not hasattr(loaded, "keys"):  # one Dataset rather than a DatasetDict
        return {None: [_dataset_part(loaded, label, wanted)]}
    return {split: [_dataset_part(part, f"{label} ({split})", wanted)] for split, part in loaded.items()}


def _dataset_part(dataset: Any, label: str, wanted: Collection[str]) -> Part:
    # Only these columns are decoded: others may be large (images, embeddings).
    kept = [column for column in dataset.column_names if column in wanted]
    return Part(label, None, list(dataset.column_names), DatasetRows(dataset.select_columns(kept)) if kept else [])


class DatasetRows:
    """The rows of a `datasets.Dataset`, from its memory-mapped file at every pass."""

    def __init__(self, dataset: Any) -> None:
        """Read nothing yet."""
        self._dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One pass. A ClassLabel stores numbers for names."""
        names = {column: getattr(feature, "int2str", None) for column, feature in self._dataset.features.items()}
        for batch in self._dataset.with_format("arrow").iter(ROWS_AT_ONCE):
            for row in batch.to_pylist():
                row |= {
                    column: to_name(row[column])
                    for column, to_name in names.items()
                    if to_name and row[column] is not None
                }
                yield without_null_entries(row)
