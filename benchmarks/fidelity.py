"""How well forecasts of LoRA runs describe the real runs, beside baselines, a second real run, and shorter real runs.

Criteria were fixed before the first run and are written into every result (CRITERIA below). The persona behaviours are
split once and for all by a hash of their names into tuning and test ones (`split_of`); mixtures are the first, second,
… dozen of either half in the order of that hash. Whatever is chosen is chosen on tuning mixtures; test mixtures are
reported.

Each run is trained once. Its forecasts use the verbs as a user would; a pilot is the beginning of that same run. Runs
and forecasts that are finished are not repeated. Costs are rows that go forward and backward through the model, as a
share of the real run's; the audit's forward passes and the observations are left out on both sides. Seconds are CPU
seconds of one thread.

    OMP_NUM_THREADS=1 python benchmarks/fidelity.py --data ../shared/data
"""

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_figures import Course, described, fit, lazy_step, ranked, rounded
from fidelity_plan import Forecast, Method, Run, Shorter, behaviours_of, data_file, plan, with_held
from harness import RESULTS, read, seconds_in, write
from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn

from foretune.models.load import load_model
from foretune.records import RunFolder, load_run
from foretune.scores import pair_scores
from foretune.training.observer import BehaviourObserver
from foretune.verbs.audit import audit_prepared, features_of, measure
from foretune.verbs.forecast import forecast_prepared
from foretune.verbs.job import Job, job_from
from foretune.verbs.prepare import Prepared, discard, prepare
from foretune.verbs.progress import Progress
from foretune.verbs.real_run import training_key
from foretune.verbs.train import train_prepared
from foretune.verbs.twin import trained_model

CRITERIA = {
    "a run counts if its mean loss ends at": "<= 0.60",
    "LoRA, AdamW, 10 % pilot, end": "Spearman of losses >= 0.90, margin R2 >= 0.80",
    "LoRA, AdamW, 20 % pilot or predictor-corrector, end": "Spearman >= 0.95, margin R2 >= 0.90, slope 0.8 to 1.25",
    "full fine-tuning, AdamW": "within 0.05 of LoRA",
    "from step 0, end": "better than every baseline",
    "from step 0, while the mean loss is >= 0.68": "margin R2 >= 0.95, slope 0.9 to 1.1",
    "at 5 % of the cost of 2,000 steps": "better than real training at the same cost",
}

OBSERVED = 100
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": ["q_proj", "v_proj"],
        "save_steps": 0.05,
    },
    # a checkpoint of all weights and their optimiser is large
    "full": {"dtype": "float32", "bf16": True, "save_steps": 0.1},
}
# A sample of the weights cannot be put into the model; simulating all of them costs a good part of so short a run.
OF_ALL_WEIGHTS: dict[str, Any] = {"twin": "weight_space", "band_runs": 2}


class Bench:
    """One run and all that is said of it; its folders are below `work`, its result in results/fidelity/."""

    def __init__(self, run: Run, data: Path, work: Path) -> None:
        self.run, self.data, self.work = run, data, work
        self.folder = work / run.name
        self.result: dict[str, Any] = read(f"fidelity/{run.name}") or {
            "criteria": CRITERIA,
            "run": run._asdict(),
            "behaviours": behaviours_of(run.mixture, data),
            "methods": {},
        }

    def job(
        self, folder: str, *, steps: int | None = None, rate: float = 1.0, rows: int | None = None, **more: Any
    ) -> Job:
        """The run's job in a folder of its own."""
        steps = steps or self.run.steps
        return job_from(
            model_name_or_path="smollm2-135m",
            test_fraction=0.0,
            output_dir=str(self.folder / folder),
            optim=self.run.optim,
            learning_rate=self.run.learning_rate * rate,
            per_device_train_batch_size=self.run.batch,
            max_steps=steps,
            seed=self.run.seed,
            disable_tqdm=True,
            draws=50,
            **{
                "dataset_name": str(data_file(self.run.mixture, rows or self.run.rows, self.data, self.work)),
                "observe_pairs": OBSERVED,
                "observations": self.run.observations,
                "save_total_limit": None,
                "dtype": self.run.dtype,
                **self._trained(),
                **more,
            },
        )

    def _trained(self) -> dict[str, Any]:
        own = TRAINED[self.run.trained]
        return own if self.run.dtype == "bfloat16" else own | {"bf16": False}

    def train(self) -> None:
        """The real run, and what its audit alone says."""
        if "observed" in self.result and (self.folder / "real" / "observed_pairs.npz").exists():
            return
        run, seconds = self._really("real", self.job("real"))
        lazy = lazy_step(observed := course(run, "observed_pairs"))
        self.result["observed"] = {
            "steps": observed.steps,
            "mean_loss": [round(observed.mean_loss(step), 4) for step in observed.steps],
            "losses": {str(step): rounded(observed.losses(step)) for step in {lazy, observed.steps[-1]} - {None}},
            "lazy_until": lazy,
            "rows": self.run.steps * self.run.batch,
            **seconds,
        }
        self.result["provenance"] = {"commit": commit(), **run.record["provenance"]}
        self.save()

    def _really(self, folder: str, job: Job) -> tuple[RunFolder, dict[str, float]]:
        """Train a job; its folder and CPU seconds, those of the observations apart."""
        prepared = prepare(job)
        run = self._audited(prepared, shared=folder == "real")
        start = time.process_time()
        with seconds_in(BehaviourObserver, "_observe") as observing:
            train_prepared(prepared, Progress.silent())
        seconds = time.process_time() - start
        return run, {"seconds": round(seconds - sum(observing), 1), "observing_seconds": round(sum(observing), 1)}

    def _audited(self, prepared: Prepared, *, shared: bool = True) -> RunFolder:
        """The job's audit; copied from the run's first one where the data are the same."""
        job, first = prepared.job, self.folder / "audit"
        if shared and first.exists() and not job.run.path.exists():
            shutil.copytree(first, job.run.path)
        run = audit_prepared(prepared, Progress.silent())
        if shared and not first.exists():
            shutil.copytree(run.path, first)
        return run

    def measure_exactly(self) -> None:
        """Margins of the trained model in float32, at the end of the lazy part and of the run.

        What a run in bfloat16 observes of itself is rounded: by a third of a nat for a pair, as much as it has learned
        by the end of the lazy part.
        """
        folder, observed = load_run(self.folder / "real"), self.observed()
        if (folder.path / "exact_pairs.npz").exists():
            return
        if self.run.dtype == "float32":
            shutil.copyfile(folder.path / "observed_pairs.npz", folder.path / "exact_pairs.npz")
            return
        prepared = prepare(job_from(**{**self.job("real").explicit, "dtype": "float32"}))
        pairs = [prepared.pairs[index] for index in prepared.observed]
        steps = sorted({0, lazy_step(observed), observed.steps[-1]} - {None})
        found = [pair_scores(_model_at(prepared, folder, step), pairs) for step in steps]
        scores = [(own.chosen - own.rejected).numpy() for own in found]
        pair_id = prepared.pairs.pair_id[prepared.observed]
        folder.write_arrays("exact_pairs", pair_id=pair_id, steps=np.array(steps), margins=np.stack(scores) - scores[0])

    def baselines(self) -> None:
        """Scores a behaviour that the audit gives, and the pilot's own losses."""
        methods = self.result["methods"]
        if "distinguishability alone" in methods:
            return
        prepared = prepare(self.job("real"))
        run, observed = load_run(self.folder / "real"), self.observed()
        rows = run.read_table("behaviours").to_pylist()  # pyright: ignore
        scores = {
            "distinguishability alone": {
                row["behaviour"]: row["distinguishability"] for row in rows if row["split"] == "train"
            },
            "behaviour kernel": run.record["audit"]["initial_rates"],
            "naive kernel": naive_kernel(prepared),
        }
        for name, values in scores.items():
            methods[name] = {"cost": 0.0, **ranked(values, observed), "scores": rounded(values)}
        self.save()

    def try_method(self, method: Method, *, again: bool = False) -> None:
        """Forecast the run, or train its rival, unless that is done."""
        if method.name in self.result["methods"] and not again:
            return
        if again:
            run = RunFolder(self.folder / method.folder)
            audited = {name: stage for name, stage in run.stages.items() if name == "audit"}  # no part of the cost
            discard(run)
            run.update_record(stages=audited)
        print(f"{self.run.name}: {method.name}", flush=True)
        (self.forecast if isinstance(method, Forecast) else self.shorten)(method)  # pyright: ignore
        self.describe(method)
        print(self.result["methods"][method.name]["end"] | {"intervals": "…"}, flush=True)

    def forecast(self, method: Forecast) -> None:
        """Forecast from the start or from the real run's own beginning."""
        job = self.job(
            method.folder,
            observe_pairs=max(method.pairs, method.looked),
            twin_pairs=method.pairs,
            factor_rank=method.rank,
            pilot_fraction=method.pilot,
            relinearise_every=self.run.steps // method.passes if method.passes > 1 else 0,
            **(OF_ALL_WEIGHTS if self.run.trained == "full" and method.passes > 1 else {}),
            **with_held(self.run, method.held, self.data, self.work),
        )
        prepared = prepare(job)
        run = self._audited(prepared, shared=not method.held)
        pilot_steps = round(method.pilot * self.run.steps)
        if method.pilot and not method.held:  # the real run has not observed what is held out: train once more
            self._lay_pilot(prepared, pilot_steps)
        start = time.process_time()
        forecast_prepared(prepared, Progress.silent())
        seconds = time.process_time() - start
        anchors = sorted(int(step) for step in run.record["forecast"]["anchors"])
        behaviours = len(self.result["behaviours"])
        rows = len(anchors) * (method.pairs + method.held) * behaviours + pilot_steps * self.run.batch
        self.result["methods"][method.name] = {
            **method._asdict(),
            "anchors": anchors,
            "rows": rows,
            "cost": round(rows / (self.run.steps * self.run.batch), 4),
            "seconds": round(seconds, 1),
            "audit_rows_forward": behaviours * self.run.rows,
        }
        for anchor in run.path.glob("features/step-*"):
            shutil.rmtree(anchor)

    def _lay_pilot(self, prepared: Prepared, steps: int) -> None:
        """The real run's beginning as this job's pilot, which would train the very same steps."""
        run, real = prepared.job.run, load_run(self.folder / "real")
        shutil.copytree(real.path / f"checkpoint-{steps}", run.path / "pilot" / "checkpoint", dirs_exist_ok=True)
        arrays = real.read_arrays("observed_pairs")
        assert arrays is not None
        place = {int(pair): index for index, pair in enumerate(arrays["pair_id"])}
        members = [place[int(pair)] for pair in prepared.pairs.pair_id[prepared.observed]]
        known = arrays["steps"] <= steps
        run.write_arrays("pilot/observed", steps=arrays["steps"][known], margins=arrays["margins"][known][:, members])
        key = training_key(prepared)
        run.write_json("pilot/pilot.json", {"key": key, "fraction": prepared.job.ours.pilot_fraction, "step": steps})

    def shorten(self, method: Shorter) -> None:
        """Train the rival and compare its end with the run's."""
        steps = round(method.share * self.run.steps)
        more = {"observations": 2, "save_steps": 1.0}
        job = self.job(method.folder, steps=steps, rate=method.rate_factor, rows=method.rows)
        job = job_from(**{**job.explicit, **more})
        run, seconds = self._really(job.run.path.name, job)
        self.result["methods"][method.name] = {
            **method._asdict(),
            "rows": steps * self.run.batch,
            "cost": round(steps / self.run.steps, 4),
            **seconds,
        }

    def describe(self, method: Method) -> None:
        """The figures of what was forecast or trained, from its folder."""
        observed, lazy = self.observed(), lazy_step(self.observed())
        end, run = observed.steps[-1], load_run(self.folder / method.folder)
        if isinstance(method, Shorter):
            said, last = course(run, "observed_pairs"), round(method.share * end)
            found = {"end": fit(said, observed, end, last), "lazy": None, "losses": rounded(said.losses(last))}
        else:
            said, begun = course(run, "forecast_pairs").only(observed.pair_id), round(method.pilot * end)
            exact = course(load_run(self.folder / "real"), "exact_pairs")
            found = described(said, observed, after=begun) | {
                "float32_end": fit(said, exact, end),
                "float32_lazy": fit(said, exact, lazy) if (lazy or 0) > begun else None,
                "trust": trust(run, said, observed),
            }
            if begun:
                parts = {"end": end, "lazy": lazy if (lazy or 0) > begun else None}
                self.result["methods"][f"persistence, {method.name}"] = {
                    "cost": method.pilot,
                    **{part: fit(said, observed, step, begun) if step else None for part, step in parts.items()},
                }
        self.result["methods"][method.name] |= found
        self.save()

    def ceiling(self) -> None:
        """The run beside those of other seeds that are there."""
        for seed in range(3):
            other = self.work / self.run._replace(seed=seed).name / "real"
            if seed != self.run.seed and (other / "observed_pairs.npz").exists():
                found = {"cost": 1.0, **described(course(load_run(other), "observed_pairs"), self.observed())}
                self.result["methods"][f"real run, seed {seed}"] = found
        self.save()

    def observed(self) -> Course:
        """The real run."""
        return course(load_run(self.folder / "real"), "observed_pairs")

    def save(self) -> None:
        """Write the result."""
        (RESULTS / "fidelity").mkdir(parents=True, exist_ok=True)
        write(f"fidelity/{self.run.name}", {key: value for key, value in self.result.items() if key != "machine"})


def _model_at(prepared: Prepared, folder: RunFolder, step: int) -> nn.Module:
    """In the job's dtype, after a step that has a checkpoint."""
    checkpoint = str(folder.path / f"checkpoint-{step}")
    if prepared.job.trainable != "lora" and step:
        return load_model(checkpoint, dtype=prepared.job.dtype()).model
    model = trained_model(prepared).eval()
    if step:
        set_peft_model_state_dict(model, load_peft_weights(checkpoint))
    return model


def course(run: RunFolder, name: str) -> Course:
    """forecast_pairs or observed_pairs of a run folder."""
    arrays, table = run.read_arrays(name), run.read_table("pairs", ["pair_id", "behaviour"])
    assert arrays is not None and table is not None
    owner = dict(zip(table["pair_id"].to_pylist(), table["behaviour"].to_pylist(), strict=True))
    behaviour = np.array([owner[int(pair)] for pair in arrays["pair_id"]])
    return Course([int(step) for step in arrays["steps"]], arrays["pair_id"], behaviour, arrays["margins"])


def trust(run: RunFolder, said: Course, observed: Course) -> dict[str, Any]:
    """What the forecast says of itself, by behaviour: does its band hold the loss, and how wrong is it at each word?

    Over the pairs that were forecast; bands are about other seeds and stand-ins, not about the model of the run.
    """
    end, table = observed.steps[-1], run.read_table("forecast")
    assert table is not None
    happened = observed.only(said.pair_id).losses(end)
    rows = {
        row["behaviour"]: row
        for row in table.to_pylist()
        if (row["step"], row["method"], row["trained_on"]) == (end, "simulated_run", "mixture")
    }
    return {
        name: {
            "word": own["word"],
            "score": round(own["score"], 4),
            "loss_error": round(rows[name]["loss"] - happened[name], 4),
            "band": [round(rows[name][f"loss_{side}"] - rows[name]["loss"], 4) for side in ("low", "high")],
        }
        for name, own in run.record["forecast"].get("confidence", {}).items()
    }


def naive_kernel(prepared: Prepared) -> dict[str, float]:
    """Mean cosine of a behaviour's mean hidden state at the answer with those of all: likeness of texts, no answers."""
    states = measure(prepared, features_of(prepared, Progress.silent())).first_state
    names = np.unique(prepared.behaviour_of)
    means = np.stack([np.asarray(states[np.flatnonzero(prepared.behaviour_of == name)]).mean(0) for name in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return {str(name): float(value) for name, value in zip(names, (means @ means.T).mean(1), strict=True)}


def commit() -> str:
    """Of the source."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> None:
    """Run what of the plan is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("FORETUNE_DATA", "../shared/data")))
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "foretune-fidelity")
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--methods", nargs="+", default=[""], help="methods whose names contain one of these")
    parser.add_argument("--again", action="store_true", help="repeat methods that are done: the code has changed")
    parser.add_argument("--figures", action="store_true", help="train nothing: compute the figures of what is there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for run, methods in plan():
        if options.only not in run.name:
            continue
        bench = Bench(run, options.data, options.work)
        if options.figures and not (bench.folder / "real" / "observed_pairs.npz").exists():
            continue
        bench.train()
        bench.measure_exactly()
        if options.figures:
            for method in methods:
                if method.name in bench.result["methods"]:
                    bench.describe(method)
            continue
        bench.baselines()
        for method in methods:
            if any(part in method.name for part in options.methods):
                bench.try_method(method, again=options.again)
        bench.ceiling()


if __name__ == "__main__":
    main()
