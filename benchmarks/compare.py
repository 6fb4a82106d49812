"""How alignment methods differ: nine of them on the same eight persona behaviours, with the same budget.

No criterion: it is `foretune compare` on real data. One run a method and seed, eight persona test behaviours with 48
training and 12 held-out pairs each. Runs that are finished are not repeated.

    OMP_NUM_THREADS=1 python benchmarks/compare.py --data ../shared/data --seeds 0,1
"""

import argparse
import json
import os
from pathlib import Path

from fidelity_plan import behaviours_of, data_file
from harness import write

from foretune.records import RunFolder
from foretune.report import build_comparison
from foretune.verbs.compare import compare
from foretune.verbs.job import job_from
from foretune.verbs.progress import Progress

METHODS = ("dpo", "ipo", "slic", "simpo", "nca", "apo_zero", "kto", "cpo", "orpo")
MIXTURE, BEHAVIOURS, ROWS = "test-0", 8, 60
SETTINGS = {
    "model_name_or_path": "smollm2-135m",
    "dtype": "bfloat16",
    "use_peft": True,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_modules": ["q_proj", "v_proj"],
    "learning_rate": 4e-4,
    "per_device_train_batch_size": 8,
    "max_steps": 40,
    "save_steps": 1.0,
    "test_fraction": 0.2,
    "observations": 2,
    "observe_pairs": 24,
    "twin_pairs": 24,
    "relinearise_every": 0,
    "band_runs": 0,
    "draws": 100,
    "disable_tqdm": True,
}


def main() -> None:
    """Run what is missing, write results/compare.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "foretune-compare")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between them")
    parser.add_argument("--seeds", default="0", help="with commas between them")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    names = behaviours_of(MIXTURE, options.data)[:BEHAVIOURS]
    rows = data_file(MIXTURE, ROWS, options.data, options.work).read_text().splitlines()
    file = options.work / "rows.jsonl"
    file.write_text("".join(line + "\n" for line in rows if json.loads(line)["behaviour"] in names))
    job = job_from(dataset_name=str(file), output_dir=str(options.work / "run"), **SETTINGS)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    run = compare(job, methods=options.methods.split(","), seeds=seeds, progress=Progress())
    build_comparison(run.path)
    seconds = {
        path.name: json.loads((path / "record.json").read_text())["train"]["seconds"]
        for path in sorted(run.path.glob("*-seed*"))
        if RunFolder(path).stage_key("train")
    }
    settings = {name: value for name, value in SETTINGS.items() if name != "disable_tqdm"}
    write("compare", {"settings": settings, "train_seconds": seconds, **(run.read_json("comparison.json") or {})})


if __name__ == "__main__":
    main()
