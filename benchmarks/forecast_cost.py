"""What a forecast of a large run from a sample of its rows costs, beside the run.

20 persona behaviours × 1,000 rows, one epoch of LoRA with DPO in batches of 16. The forecast is `foretune forecast`
with `--audit_pairs n --twin_pairs n --observe_pairs n`, audit, encoding of all rows, simulation and bands included. A
step of the run is the difference of two short real runs, TRL's reference scores included; the run is 1,250 of them.
CPU seconds of one thread.

    OMP_NUM_THREADS=1 python benchmarks/forecast_cost.py --data ../shared/data
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import machine, write

from foretune.data import load_preferences
from foretune.verbs.forecast import forecast_prepared
from foretune.verbs.job import Job, job_from
from foretune.verbs.prepare import prepare
from foretune.verbs.progress import Progress
from foretune.verbs.train import train_prepared

CRITERION = "a forecast from step 0 costs at most 5 % of the run"
BEHAVIOURS, ROWS, BATCH = 20, 1000, 16
# (pairs of each behaviour, runs of the band)
FORECASTS = ((10, 0), (25, 0), (25, 5))
SHORT, LONG = 4, 34


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, data = Path(folder), Path(folder) / "rows.jsonl"
        rows = write_rows(given.data / "persona", data)
        seconds_a_step = (trained(data, work, LONG) - trained(data, work, SHORT)) / (LONG - SHORT)
        steps = rows // BATCH
        run = steps * seconds_a_step
        forecasts = []
        for count, band in FORECASTS:
            seconds, record = forecast(data, work, count, band)
            found = {
                "pairs": count,
                "band_runs": band,
                "seconds": round(seconds, 1),
                "share": round(seconds / run, 4),
                **record,
            }
            forecasts.append(found)
            print(found, flush=True)
    content = {"criterion": CRITERION, "rows": rows, "steps": steps, "run_seconds": round(run, 1)}
    write("forecast_cost", {**content, "forecasts": forecasts, "machine": machine()})


def write_rows(source: Path, target: Path, *, rows: int = ROWS) -> int:
    """The first behaviours' rows, `rows` of each; their number."""
    names = sorted(path.stem for path in source.glob("*.jsonl"))[:BEHAVIOURS]
    found = load_preferences(str(source), behaviours=names, max_pairs_per_behaviour=rows, test_fraction=0.0)
    columns = ["prompt", "chosen", "rejected", "behaviour"]
    target.write_text("".join(json.dumps(row) + "\n" for row in found.train.select_columns(columns)))
    return len(found.train)


def job(data: Path, folder: Path, **more: Any) -> Job:
    """LoRA, one epoch where nothing else is said."""
    return job_from(
        model_name_or_path="smollm2-135m",
        dataset_name=str(data),
        output_dir=str(folder),
        test_fraction=0.0,
        use_peft=True,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-4,
        save_strategy="no",
        disable_tqdm=True,
        **{"num_train_epochs": 1, **more},
    )


def trained(data: Path, work: Path, steps: int) -> float:
    """CPU seconds of so many real steps, and of what comes before and after them, however many they are."""
    few = {"audit_pairs": 2, "observe_pairs": 2, "twin_pairs": 2, "observations": 2}
    prepared = prepare(job(data, work / f"real-{steps}", max_steps=steps, **few))
    start = time.process_time()
    train_prepared(prepared, Progress.silent())
    return time.process_time() - start


def forecast(data: Path, work: Path, count: int, band: int) -> tuple[float, dict[str, Any]]:
    """CPU seconds of everything from reading the file to the curves, and what the record says of them."""
    sample = {f"{what}_pairs": count for what in ("audit", "observe", "twin")}
    start = time.process_time()
    prepared = prepare(job(data, work / f"sample-{count}-{band}", **sample, band_runs=band, relinearise_every=0))
    read = time.process_time() - start
    run = forecast_prepared(prepared, Progress.silent())
    record = run.record["forecast"]
    return time.process_time() - start, {"reading_seconds": round(read, 1), "rows_share": record["cost"]}


if __name__ == "__main__":
    main()
