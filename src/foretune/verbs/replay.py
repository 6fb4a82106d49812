"""`replay`: repeat a run folder's verbs elsewhere and compare all its tables."""

from pathlib import Path

import numpy as np

from foretune.errors import UserError
from foretune.records import RunFolder, load_run
from foretune.verbs.job import job_from
from foretune.verbs.progress import Progress
from foretune.verbs.reward import reward
from foretune.verbs.rlhf import rlhf
from foretune.verbs.run_all import run_all

COMPARED = ("behaviours", "pairs", "forecast", "observed", "ensemble", "policy")


def replay(
    run: str | Path, output_dir: str | Path, *, progress: Progress | None = None
) -> tuple[RunFolder, dict[tuple[str, str], float]]:
    """Repeat what `run` holds from its config.yaml.

    Args:
        run: a run folder.
        output_dir: where the repetition goes.
        progress: where progress is shown.

    Returns:
        The new run folder, and the largest relative difference of each numeric column of each table.

    Raises:
        UserError: not a run folder, no config.yaml, the same folder, or tables with different rows.
    """
    source = load_run(run)
    settings = source.read_yaml("config.yaml")
    if settings is None:
        raise UserError(f"{source.path} has no config.yaml: it cannot be repeated.")
    if source.path.resolve() == Path(output_dir).resolve():
        raise UserError("the repetition needs a folder of its own: pass another --output_dir.")
    settings, progress = {**settings, "output_dir": str(output_dir)}, progress or Progress.silent()
    if source.stage_key("rlhf"):
        repeated = rlhf(progress=progress, **settings)
    elif source.record.get("forecast", {}).get("twin") == "score":
        repeated = reward(progress=progress, **settings)
    else:
        verbs = tuple(verb for verb in ("forecast", "train", "verify") if source.stage_key(verb))
        repeated = run_all(job_from(**settings), progress, verbs=verbs)
    return repeated, differences(source, repeated)


def differences(left: RunFolder, right: RunFolder) -> dict[tuple[str, str], float]:
    """Largest relative difference a numeric column, over the tables that both folders hold."""
    found = {}
    for name in COMPARED:
        first, second = left.read_table(name), right.read_table(name)
        if first is None or second is None:
            continue
        if first.num_rows != second.num_rows:
            raise UserError(f"{name} has {first.num_rows} rows in {left.path}, {second.num_rows} in {right.path}.")
        for column in first.column_names:
            if str(first.schema.field(column).type) == "double":
                pair = [np.array(table[column].to_pylist(), dtype=float) for table in (first, second)]
                scale = np.nanmax(np.abs(pair[0]), initial=0.0) or 1.0
                found[name, column] = float(np.nanmax(np.abs(pair[0] - pair[1]), initial=0.0) / scale)
    return found
