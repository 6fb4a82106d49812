"""Whether `what_if` says rightly what a changed run does: forecast change per behaviour against that of real runs.

Criteria, fixed before the first run, are in CRITERIA. One run of eight persona test behaviours is forecast and trained;
each question changes one thing of it, is answered from the forecast's features, and is then trained as well, from the
same seed. Seed noise is the root mean square difference of a behaviour's loss between runs that differ by seed alone.
Real runs that are finished are not repeated. With --recorded those of questions are not trained at all but taken from
results/what_if.json, and forecasts and answers are those of the present code.

    OMP_NUM_THREADS=2 python benchmarks/what_if.py --data ../shared/data
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from fidelity import commit
from fidelity_figures import intervals
from fidelity_plan import behaviours_of, data_file
from harness import machine, read, write

from foretune.dynamics.curves import curve_rows
from foretune.verbs.forecast import forecast_prepared
from foretune.verbs.job import Job, job_from
from foretune.verbs.prepare import Prepared, prepare
from foretune.verbs.progress import Progress
from foretune.verbs.train import train_prepared
from foretune.verbs.what_if import StoredTwin, changed_rows, what_if
from foretune.verification.compare import spearman

CRITERIA = {
    "questions": ">= 20",
    "spearman": ">= 0.8 over all behaviours of all questions",
    "sign_right": ">= 0.9 where the observed change exceeds the seed noise",
}
MIXTURE, BEHAVIOURS, ROWS, BATCH, STEPS, PASSES = "test-0", 8, 60, 16, 75, 5
SEEDS = (1, 2, 3, 4)
FORECASTS = {"from step 0": 0, f"{PASSES} passes": STEPS // PASSES}


class Question(NamedTuple):
    """What is changed, as `what_if` takes it."""

    name: str
    change: dict[str, Any]


def questions(names: list[str]) -> list[Question]:
    """All of them, in the order in which they are tried."""
    each = [
        *({"drop": [name]} for name in names[:6]),
        *({"weight": {name: 4.0}} for name in names[:4]),
        *({"weight": {name: 0.25}} for name in names[4:6]),
        *({"learning_rate": rate} for rate in (1e-4, 4e-4)),
        *({"beta": beta} for beta in (0.05, 0.3)),
        *({"rows_per_behaviour": count} for count in (30, 15)),
        *({"label_noise": share} for share in (0.1, 0.25)),
        *({"objective": name} for name in ("hinge", "ipo")),
        *({"max_steps": steps} for steps in (40, 110)),
        {"lr_scheduler_type": "constant"},
        {"data_seed": 7},
    ]
    return [Question(", ".join(f"{key} {_said(value)}" for key, value in change.items()), change) for change in each]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={factor:g}" for name, factor in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)


def rows_of(mixture: str, data: Path, work: Path) -> tuple[list[str], Path]:
    """The first behaviours of a mixture, and a file of their rows."""
    work.mkdir(parents=True, exist_ok=True)
    names = behaviours_of(mixture, data)[:BEHAVIOURS]
    rows = data_file(mixture, ROWS, data, work).read_text().splitlines(keepends=True)
    file = work / "rows.jsonl"
    file.write_text("".join(line for line in rows if json.loads(line)["behaviour"] in names))
    return names, file


def job(folder: Path, data: Path, **more: Any) -> Job:
    """The run that questions are about."""
    return job_from(
        **{
            "model_name_or_path": "smollm2-135m",
            "dtype": "bfloat16",
            "dataset_name": str(data),
            "test_fraction": 0.0,
            "output_dir": str(folder),
            "use_peft": True,
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_modules": ["q_proj", "v_proj"],
            "learning_rate": 2e-4,
            "per_device_train_batch_size": BATCH,
            "max_steps": STEPS,
            "save_steps": 1.0,
            "observations": 2,
            "observe_pairs": ROWS,
            "twin_pairs": ROWS,
            "band_runs": 0,
            "disable_tqdm": True,
            "draws": 50,
            **more,
        }
    )


def losses_of(prepared: Prepared) -> dict[str, float]:
    """Each behaviour's loss at the end of a real run, in the base run's objective whatever it was trained with."""
    folder = prepared.job.run.path
    kept = folder / "losses.json"
    if not kept.exists():
        train_prepared(prepared, Progress.silent())
        arrays = prepared.job.run.read_arrays("observed_pairs")
        assert arrays is not None
        members = prepared.observed
        rows = curve_rows(
            arrays["steps"][-1:].tolist(),
            arrays["margins"][-1:],
            prepared.behaviour_of[members],
            prepared.split_of[members],
            job(folder, folder).objective(),
            reference_margin=np.zeros(len(members)),
            weights=np.ones(len(members)),
        )
        kept.write_text(json.dumps({row["behaviour"]: row["loss"] for row in rows if row["behaviour"] != "all"}))
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
    return json.loads(kept.read_text())


def changed(base: Prepared, twin: StoredTwin, question: Question, folder: Path) -> Prepared:
    """The base run with the question's change, its audit (which is of the base's rows) taken over."""
    change = dict(question.change)
    parts = {key: change.pop(key) for key in ("drop", "weight", "rows_per_behaviour", "label_noise") if key in change}
    if name := change.pop("objective", None):
        change["loss_type"] = [name]
    chosen, weights, flipped = changed_rows(twin, **parts)
    rows = base.rows("train")
    assert rows is not None
    columns = rows.select(chosen).to_dict()
    for index in np.flatnonzero(flipped):
        columns["chosen"][index], columns["rejected"][index] = columns["rejected"][index], columns["chosen"][index]
    columns["weight"] = weights.tolist()
    if not folder.exists():
        shutil.copytree(base.job.run.path, folder, ignore=shutil.ignore_patterns("step-*"))
    new = base._replace(
        job=job_from(**{**base.job.explicit, **change, "output_dir": str(folder)}),
        data=base.data._replace(train=Dataset.from_dict(columns)),
    )
    run = new.job.run
    run.update_record(stages={name: stage for name, stage in run.stages.items() if name == "audit"})
    return new


def judged(answers: dict[str, dict[str, float]], observed: dict[str, dict[str, float]], noise: float) -> dict[str, Any]:
    """Figures over the questions that both have; intervals are bootstraps over questions."""
    names = [name for name in observed if name in answers]

    def figures(drawn: list[str]) -> tuple[float, float]:
        pairs = [(answers[name][key], observed[name][key]) for name in drawn for key in observed[name]]
        said, seen = np.array(pairs).T
        clear = np.abs(seen) > noise
        return spearman(list(said), list(seen)), float(np.mean(np.sign(said[clear]) == np.sign(seen[clear])))

    keys = ("spearman", "sign_right")
    each = {
        name: round(spearman(*([side[name][key] for key in observed[name]] for side in (answers, observed))), 3)
        for name in names
    }
    seen = np.array([value for name in names for value in observed[name].values()])
    return {
        "questions": len(names),
        "changes": len(seen),
        "clear_changes": int((np.abs(seen) > noise).sum()),
        **dict(zip(keys, figures(names), strict=True)),
        "intervals": intervals(figures, names, keys),
        "spearman_within_questions": each,
    }


def main() -> None:
    """Ask, train what is missing, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "foretune-what-if")
    parser.add_argument("--recorded", action="store_true", help="questions' real runs: those of the last results")
    options = parser.parse_args()
    earlier = read("what_if") if options.recorded else None
    names, file = rows_of(MIXTURE, options.data, options.work)
    twins = {}
    for forecast, every in FORECASTS.items():
        prepared = prepare(job(options.work / forecast.replace(" ", "-"), file, relinearise_every=every))
        forecast_prepared(prepared, Progress.silent())
        twins[forecast] = StoredTwin(prepared.job.run)
    base = prepare(job(options.work / "from-step-0", file))
    before = losses_of(changed(base, twins["from step 0"], Question("base", {}), options.work / "base"))
    others = [prepare(job(options.work / f"seed-{seed}", file, seed=seed)) for seed in SEEDS]
    seeds = [before, *map(losses_of, others)]
    noise = noise_of(seeds)
    result: dict[str, Any] = {
        "criteria": CRITERIA,
        "run": {"behaviours": names, "rows": ROWS, "batch": BATCH, "steps": STEPS, "loss": before},
        "seed_noise": noise,
        "machine": machine(),
        "commit": commit(),
        "answers": {forecast: {} for forecast in twins},
        "seconds": {forecast: {} for forecast in twins},
        "observed": {},
    }
    if earlier:
        own = {"commit": earlier["commit"], "machine": earlier["machine"], "loss": earlier["run"]["loss"]}
        result["real_runs"] = earlier.get("real_runs", own)
    for number, question in enumerate(questions(names)):
        for forecast, twin in twins.items():
            start = time.perf_counter()
            answer = what_if(twin, **question.change)
            result["seconds"][forecast][question.name] = round(time.perf_counter() - start, 2)
            result["answers"][forecast][question.name] = {
                row["behaviour"]: round(row["loss_change"], 5) for row in answer.rows if row["behaviour"] != "all"
            }
        if earlier:
            result["observed"][question.name] = earlier["observed"][question.name]
        else:
            after = losses_of(changed(base, twins["from step 0"], question, options.work / f"question-{number}"))
            result["observed"][question.name] = {name: round(after[name] - before[name], 5) for name in before}
        result["figures"] = {
            forecast: judged(answers, result["observed"], noise) for forecast, answers in result["answers"].items()
        }
        write("what_if", result)
        print(
            question.name,
            {name: own["spearman_within_questions"][question.name] for name, own in result["figures"].items()},
        )
    print(json.dumps(result["figures"], indent=1))


def noise_of(runs: list[dict[str, float]]) -> float:
    """Root mean square difference of a behaviour's loss between two runs that differ by seed alone."""
    losses = np.array([[run[name] for name in runs[0]] for run in runs])
    return float(np.sqrt(2 * losses.var(axis=0, ddof=1).mean()))


if __name__ == "__main__":
    main()
