"""How long what-ifs take: answers from the stored features of 2,000 pairs, on all cores.

20 persona behaviours × 100 pairs, LoRA with DPO, three epochs in batches of 16: all of them measured and observed
once, and what is measured, how often, where nothing is said.

    python benchmarks/what_if_time.py --data ../shared/data
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from forecast_cost import BATCH, job, write_rows
from harness import machine, write

from foretune.verbs.forecast import forecast_prepared
from foretune.verbs.prepare import prepare
from foretune.verbs.progress import Progress
from foretune.verbs.what_if import StoredTwin, what_if

CRITERION = "each answer in under 10 s on 2 cores for 2,000 pairs"
ROWS, EPOCHS = 100, 3
FORECASTS: dict[str, dict[str, Any]] = {
    "every pair, one pass": {"twin_pairs": ROWS, "observe_pairs": ROWS, "relinearise_every": 0},
    "default": {},
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        pairs = write_rows(given.data / "persona", data, rows=ROWS)
        studies = {name: ask(data, Path(folder) / name, more) for name, more in FORECASTS.items()}
    content = {"criterion": CRITERION, "pairs": pairs, "steps": EPOCHS * pairs // BATCH, "forecasts": studies}
    write("what_if_time", {**content, "machine": machine()})


def ask(data: Path, folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each question to one forecast."""
    prepared = prepare(job(data, folder, num_train_epochs=EPOCHS, band_runs=0, **more))
    run = forecast_prepared(prepared, Progress.silent())
    twin, name = StoredTwin(run), str(prepared.pairs.names[0])
    questions = (
        *({"drop": [name]}, {"weight": {name: 2.0}}, {"objective": "ipo"}, {"learning_rate": 2e-4}, {"beta": 0.3}),
        *({"label_noise": 0.1}, {"rows_per_behaviour": 50}, {"data_seed": 3}),
    )
    seconds = {}
    for question in questions:
        start = time.perf_counter()
        what_if(twin, **question)
        seconds[next(iter(question))] = round(time.perf_counter() - start, 2)
        print(question, next(reversed(seconds.values())), flush=True)
    forecast = run.record["forecast"]
    passes, looked = len(forecast["anchors"]), forecast["look_explains"] is not None
    return {"passes": passes, "looked": looked, "seconds": seconds, "median": median(seconds.values())}


if __name__ == "__main__":
    main()
