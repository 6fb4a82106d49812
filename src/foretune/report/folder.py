"""Read a run folder: JSON and Parquet only, every later file may be missing."""

import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from foretune.errors import UserError
from foretune.records.run_folder import refuse_rlhf

Row = dict[str, Any]
ALL = "all"
REAL_RUN = "real_run"
METHODS = ("simulated_run", "gradient_flow", "second_order")
MAX_PAIRS = 20
STAGES = {
    "behaviours": ("foretune audit", "how distinguishable each behaviour is, and which rows look wrong"),
    "forecast": ("foretune forecast", "forecast curves: what training will do to each behaviour"),
    "observed": ("foretune train", "what training really did to each behaviour"),
    "verification": ("foretune verify", "how right the forecast was"),
}


@dataclass(frozen=True)
class RunFolder:
    """What one run folder holds; absent files are empty, NaN is `None`.

    Attributes:
        path: The folder.
        record: `record.json`.
        behaviours: Rows of `behaviours.parquet`, one per behaviour and split.
        forecast: Rows of `forecast.parquet` (the best method there is); none where they are those of the run itself.
        observed: Rows of `observed.parquet`.
        findings: Rows of `findings.parquet`.
        pairs: The rows that push hardest against their own behaviour, at most 20.
        verification: `verification.json`.
    """

    path: Path
    record: Row = field(default_factory=dict)
    behaviours: list[Row] = field(default_factory=list)
    forecast: list[Row] = field(default_factory=list)
    observed: list[Row] = field(default_factory=list)
    findings: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    verification: Row = field(default_factory=dict)

    @property
    def audit(self) -> Row:
        """The audit's part of the record."""
        return self.record.get("audit") or {}

    @property
    def names(self) -> list[str]:
        """The behaviours, in the order of the record (`all` only when it is the user's one behaviour)."""
        listed = list((self.record.get("data") or {}).get("behaviours") or [])
        listed += [row["behaviour"] for row in self.behaviours]
        curves = [row["behaviour"] for row in self.forecast + self.observed]
        listed += [name for name in curves if name != ALL]
        return list(dict.fromkeys(listed)) or ([ALL] if curves else [])

    @property
    def split(self) -> str:
        """The split that verdicts are given on: the verification's, else `train`, else what there is."""
        splits = {row["split"] for row in self.observed or self.forecast}
        wanted = [self.verification.get("split"), "train", *sorted(splits)]
        return next((name for name in wanted if name in splits), "train")

    @property
    def missing(self) -> list[tuple[str, str, str]]:
        """(file, command that adds it, what it adds) for each stage that has not been run."""
        return [
            (name, f"{verb} --output_dir {shlex.quote(str(self.path))}", adds)
            for name, (verb, adds) in STAGES.items()
            if not getattr(self, name) and not (name in ("forecast", "verification") and self._run_was_forecast)
        ]

    @property
    def _run_was_forecast(self) -> bool:
        """Whether training was asked for as a forecast, to which there is nothing to compare."""
        said = self.record.get("forecast") or {}
        return bool(said) and said.get("pilot_steps") == said.get("steps")

    def measures(self, behaviour: str) -> Row:
        """The behaviour's row of `behaviours.parquet`, on the training split where there is one."""
        rows = [row for row in self.behaviours if row["behaviour"] == behaviour]
        return next((row for row in rows if row.get("split") == "train"), rows[0] if rows else {})


def clean(value: Any) -> Any:
    """The value with every NaN or infinity inside it replaced by `None`."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def curve(rows: Iterable[Row], behaviour: str, split: str, trained_on: str = "mixture") -> list[Row]:
    """The rows of one behaviour and split in the order of their steps."""
    kept = [row for row in rows if row["behaviour"] == behaviour and row["split"] == split]
    kept = [row for row in kept if row.get("trained_on", trained_on) == trained_on]
    return sorted(kept, key=lambda row: row["step"])


def read_folder(run_dir: Path | str) -> RunFolder:
    """Read what a run folder holds.

    Raises:
        UserError: There is no such folder, it holds no `record.json`, it holds an
            RLHF run, or a file in it cannot be read.
    """
    path = Path(run_dir)
    if not (path / "record.json").is_file():
        what = "has no record.json" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}, so it is not a run folder. Run `foretune audit` first.")
    record = _read_json(path / "record.json")
    refuse_rlhf(path, record)
    return RunFolder(
        path=path,
        record=record,
        behaviours=_read_rows(path / "behaviours.parquet"),
        forecast=_best_method(_read_rows(path / "forecast.parquet")),
        observed=_read_rows(path / "observed.parquet"),
        findings=_read_rows(path / "findings.parquet"),
        pairs=_read_worst_pairs(path / "pairs.parquet"),
        verification=_read_json(path / "verification.json"),
    )


def _read_json(path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Run the command that wrote it again.") from error
    return clean(loaded) if isinstance(loaded, dict) else {}


def _read_table(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}). Run the command that wrote it again.") from error


def _read_rows(path: Path) -> list[Row]:
    table = _read_table(path)
    return [] if table is None else clean(table.to_pylist())


def _read_worst_pairs(path: Path) -> list[Row]:
    """The pairs that lie furthest on the wrong side; one row group of the table is in memory at a time."""
    if not path.is_file():
        return []
    try:
        with pq.ParquetFile(path) as file:
            if "alignment" not in file.schema_arrow.names:
                return []
            worst = file.schema_arrow.empty_table()
            for group in range(file.num_row_groups):
                against = file.read_row_group(group).filter(pc.field("alignment") < 0.0)
                worst = pa.concat_tables([worst, against]).sort_by("alignment").slice(0, MAX_PAIRS)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}). Run the command that wrote it again.") from error
    return clean(worst.to_pylist())


def _best_method(rows: list[Row]) -> list[Row]:
    """The rows of the best method there is, for the mixture and for each behaviour alone by themselves."""
    kept, rows = [], [row for row in rows if row.get("method") != REAL_RUN]
    for trained_on in dict.fromkeys(row.get("trained_on") for row in rows):
        same = [row for row in rows if row.get("trained_on") == trained_on]
        present = list(dict.fromkeys(row.get("method") for row in same))
        best = next((method for method in METHODS if method in present), present[0])
        kept += [row for row in same if row.get("method") == best]
    return kept
