"""One folder a run: JSON for what is said once, Parquet for tables; every file is complete or absent."""

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from foretune import processes
from foretune.errors import UserError, first_line
from foretune.memory import give_back
from foretune.records.schema import SCHEMA_VERSION, TABLES

# Rows of a table that are in memory while it is written, and one row group of the file.
ROWS_AT_ONCE = 4096
# What each stage leaves for the verbs after it, beside record.json.
FILES = {
    "audit": ("behaviours.parquet", "pairs.parquet", "findings.parquet"),
    "forecast": ("forecast.parquet", "forecast_pairs.npz"),
    "train": ("observed.parquet", "observed_pairs.npz"),
    "rlhf": ("policy.parquet",),
}
# What Arrow, NumPy and YAML raise for files that were cut short or overwritten.
_DAMAGES = (pa.ArrowException, OSError, zipfile.BadZipFile, ValueError, EOFError, KeyError, yaml.YAMLError)


class RunFolder:
    """Reads and writes the files of one run; of several processes, the main one alone writes.

    Args:
        path: the folder; created on the first write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Remember the place; nothing is touched yet."""
        self.path = Path(path)

    @property
    def record(self) -> dict[str, Any]:
        """record.json, or an empty record."""
        found = self.read_json("record.json") or {"schema_version": SCHEMA_VERSION, "stages": {}}
        if not isinstance(found, dict) or not isinstance(found.get("stages", {}), dict):
            raise UserError(f"{self.path / 'record.json'} is no record of a run: remove it and run the verb again.")
        return found

    def update_record(self, **sections: Any) -> None:
        """Replace whole sections of record.json."""
        self.write_json("record.json", {**self.record, **sections})

    @property
    def stages(self) -> dict[str, Any]:
        """The finished stages."""
        return self.record["stages"]

    def stage_key(self, stage: str) -> str | None:
        """The key under which `stage` was finished, None if it was not."""
        return self.stages.get(stage, {}).get("key")

    def is_finished(self, stage: str, key: str, *also: str) -> bool:
        """Whether `stage` was finished under `key` and its files can still be opened; every process must ask.

        Args:
            stage: audit, forecast, train or rlhf.
            key: everything that the stage depends on.
            *also: further files that must be there.
        """

        def holds() -> bool:
            return self.stage_key(stage) == key and all(self._opens(name) for name in (*FILES[stage], *also))

        # One answer for all: the main process may be writing the files anew before another one has looked.
        return all(processes.together(holds))

    def _opens(self, name: str) -> bool:
        """Whether a file is there, with what is written last: the end of a table, the list of arrays, all of a text."""
        path = self.path / name
        try:
            if path.suffix == ".parquet":
                pq.read_schema(path)
            elif path.suffix == ".npz":
                zipfile.ZipFile(path).close()
            else:
                return self.read_yaml(name) is not None
        except (*_DAMAGES, UserError):
            return False
        return True

    def finish_stage(self, stage: str, *, key: str, seconds: float, **sections: Any) -> None:
        """Mark `stage` as finished; last of all its writes, so that a killed run repeats it."""
        entry = {"key": key, "finished_at": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": seconds}
        self.update_record(stages={**self.stages, stage: entry}, **sections)

    def read_json(self, name: str) -> Any:
        """A JSON file's content, None if it is missing."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}): remove it and run the verb again.") from error

    def write_json(self, name: str, content: Any) -> None:
        """Write JSON; NaN and infinity become null."""
        text = json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False)
        self._write(name, lambda path: path.write_text(text + "\n", "utf-8"))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table | None:
        """A Parquet table by its name without suffix, None if it is missing; with those of `columns` that it has."""
        path = self.path / f"{name}.parquet"
        if not path.exists():
            return None
        with self._told(path.name):
            known = None if columns is None else [name for name in columns if name in pq.read_schema(path).names]
            return pq.read_table(path, columns=known)

    def need_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The same of a table that a finished stage has left.

        Raises:
            UserError: it is missing, or damaged.
        """
        table = self.read_table(name, columns)
        if table is None:
            raise self._missing(f"{name}.parquet")
        return table

    def write_table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows as a Parquet table with the schema of `name`; they are read once, some in memory at a time."""
        remaining = iter(rows)

        def write(path: Path) -> None:
            with pq.ParquetWriter(path, TABLES[name]) as file:
                while block := [dict(row) for row in islice(remaining, ROWS_AT_ONCE)]:
                    file.write_table(pa.Table.from_pylist(block, schema=TABLES[name]))
                    give_back()

        self._write(f"{name}.parquet", write)

    def write_yaml(self, name: str, content: Mapping[str, Any]) -> None:
        """Write YAML that `--config` reads."""
        text = yaml.safe_dump(dict(content), sort_keys=True, allow_unicode=True)
        self._write(name, lambda path: path.write_text(text, "utf-8"))

    def read_yaml(self, name: str) -> dict[str, Any] | None:
        """A YAML file's content, None if it is missing."""
        path = self.path / name
        if not path.exists():
            return None
        with self._told(name):
            content = yaml.safe_load(path.read_text("utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"it holds {type(content).__name__}, not settings by name")
            return content

    def write_arrays(self, name: str, **arrays: Any) -> None:
        """Write NumPy arrays to a compressed .npz file (no pickle)."""
        import numpy as np

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)

        self._write(f"{name}.npz", write)

    def read_arrays(self, name: str) -> dict[str, Any] | None:
        """The arrays of an .npz file, None if it is missing."""
        import numpy as np

        path = self.path / f"{name}.npz"
        if not path.exists():
            return None
        with self._told(f"{name}.npz"), np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    def need_arrays(self, name: str) -> dict[str, Any]:
        """The same of an .npz file that a finished stage has left.

        Raises:
            UserError: it is missing, or damaged.
        """
        arrays = self.read_arrays(name)
        if arrays is None:
            raise self._missing(f"{name}.npz")
        return arrays

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Inside, a file that cannot be read is told to the user, with the verb that writes it again."""
        try:
            yield
        except _DAMAGES as error:
            raise UserError(
                f"{self.path / name} cannot be read ({first_line(error)}): remove it and {self._writer(name)}."
            ) from error

    def _missing(self, name: str) -> UserError:
        return UserError(f"{self.path / name} is missing: {self._writer(name)}.")

    def _writer(self, name: str) -> str:
        """What to run for a file to be written again; what was computed for it is kept."""
        stage = next((stage for stage, files in FILES.items() if name in files), None)
        if name == "config.yaml":
            return "run `foretune audit` again with its --config or all its arguments"
        if stage is None:
            return "run the same command again"
        verb = "reward" if self.record.get("forecast", {}).get("twin") == "score" else stage
        return f"run `foretune {verb} --output_dir {self.path}` again, which writes it"

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        if not processes.is_main():
            return
        target = self.path / name
        scratch = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write(scratch)
            os.replace(scratch, target)
        except OSError as error:
            scratch.unlink(missing_ok=True) if scratch.parent.is_dir() else None
            raise UserError(
                f"cannot write {target} ({error.strerror or error}): free some space or choose another --output_dir; "
                "what was written so far is kept."
            ) from error


def load_run(path: str | os.PathLike[str]) -> RunFolder:
    """Open an existing run folder.

    Raises:
        UserError: `path` holds no record of a run, or one of a newer foretune.
    """
    run = RunFolder(path)
    if not (run.path / "record.json").exists():
        raise UserError(f"{path} is not a run folder (no record.json): give the --output_dir of an earlier run.")
    version = run.record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} was written with record version {version}, this foretune reads {SCHEMA_VERSION}.")
    return run


def refuse_rlhf(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Refuse the run folder of a policy where a preference run is asked for.

    Raises:
        UserError: it is one.
    """
    if "rlhf" in record.get("stages", {}):
        raise UserError(
            f"{path} holds an RLHF run, forecast and outcome side by side in policy.parquet: "
            f"`foretune rlhf --output_dir {path}` shows them."
        )


def refuse_trained_instead(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Refuse a forecast whose place training has taken, where one from features is asked for.

    Raises:
        UserError: it is one.
    """
    if record["forecast"]["pilot_steps"] >= record["forecast"]["steps"]:
        raise UserError(
            f"the forecast in {path} is the run itself, which was cheaper to train than to forecast: for one from "
            f"features, run `foretune forecast --relinearise_every 0 --output_dir {path}`."
        )


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if hasattr(content, "tolist"):
        return _finite(content.tolist())
    return None if isinstance(content, float) and not math.isfinite(content) else content
