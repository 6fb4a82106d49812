"""`verify`: forecast beside outcome."""

from collections.abc import Mapping
from typing import Any

from foretune.errors import UserError
from foretune.records import RunFolder, load_run
from foretune.records.provenance import sha256_of
from foretune.records.run_folder import refuse_rlhf, refuse_trained_instead
from foretune.verbs.progress import Progress
from foretune.verification import compare, judge_revisions


def verify(run: "RunFolder | str", *, split: str = "train", progress: Progress | None = None, **ours: Any) -> RunFolder:
    """Lay the forecast of a run folder beside its training run and write verification.json.

    Args:
        run: a run folder (or its path) in which forecast and train are finished.
        split: whose curves to compare: train or test.
        progress: where progress is shown.
        **ours: `draws`, `seed` of the intervals.

    Raises:
        UserError: forecast or training is missing.
    """
    folder = run if isinstance(run, RunFolder) else load_run(run)
    refuse_rlhf(folder.path, folder.record)
    if missing := [name for name in ("forecast", "train") if folder.stage_key(name) is None]:
        raise UserError(
            f"{folder.path} has no finished {' and no finished '.join(missing)}: run "
            f"`foretune {missing[0]} --output_dir {folder.path}` first."
        )
    refuse_trained_instead(folder.path, folder.record)
    tables = {name: folder.need_table(name) for name in ("forecast", "observed")}
    pairs = folder.need_table("pairs", ["pair_id", "behaviour", "split"])
    arrays = {name: folder.need_arrays(name) for name in ("forecast_pairs", "observed_pairs")}
    record = folder.record
    found = compare(
        tables["forecast"].to_pylist(),
        tables["observed"].to_pylist(),
        arrays["forecast_pairs"],
        arrays["observed_pairs"],
        {row["pair_id"]: row["behaviour"] for row in pairs.to_pylist() if row["split"] == split},
        split=split,
        after=record["forecast"]["pilot_steps"],
        caveats=[*_of_another_run(record), *record["forecast"]["notes"], *record["train"]["notes"]],
        **ours,
    )
    revisions = judge_revisions(record.get("revisions", []), tables["observed"].to_pylist(), split=split)
    folder.write_json("verification.json", {**found.as_json(), "revisions": revisions})
    stages = [folder.stage_key("forecast"), folder.stage_key("train"), split]
    folder.finish_stage("verify", key=sha256_of(stages), seconds=0.0)
    (progress or Progress.silent()).say(f"verify: {found.sentence}")
    return folder


def _of_another_run(record: Mapping[str, Any]) -> list[str]:
    """What the user said of the run when it was forecast and when it was trained, where that differs."""
    said, trained = (record[stage].get("training") for stage in ("forecast", "train"))
    if said is None or trained is None or said == trained:
        return []
    names = sorted(name for name in {*said, *trained} if said.get(name) != trained.get(name))
    return [f"The run that was trained is not the one that was forecast: they differ in {', '.join(names)}."]
