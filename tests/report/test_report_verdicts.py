"""The verdicts: their rules, their precedence, and what partial folders allow."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foretune.errors import UserError
from foretune.report import verdicts as v
from foretune.report.answer import actions, answer, listed, quality_word
from foretune.report.folder import read_folder
from foretune.report.outcomes import outcomes, scale_of


def judged(path: Path) -> dict[str, v.BehaviourVerdict]:
    return {item.behaviour: item for item in v.judge(read_folder(path))}


def curve_rows(losses: dict[str, list[float]], **extra) -> list[dict]:
    rows = []
    for name, values in losses.items():
        rows += [
            {"behaviour": name, "split": "train", "step": 10 * i, "loss": loss, **extra}
            for i, loss in enumerate(values)
        ]
    return rows


def with_curves(path: Path, losses: dict[str, list[float]], **changes) -> dict[str, str]:
    folder = replace(read_folder(path), observed=curve_rows(losses), behaviours=[], forecast=[], verification={})
    folder.record["data"]["behaviours"] = list(losses)
    return {item.behaviour: item.verdict for item in v.judge(replace(folder, **changes))}


def test_full_run_from_learned_first_to_unlearned(full_run, names):
    found = judged(full_run)
    assert [found[name].verdict for name in names] == [
        v.LEARNED_FIRST,
        v.LEARNED_FIRST,
        v.LEARNED,
        v.SLOW,
        v.UNLEARNED,
        v.UNLEARNED,
    ]
    assert {item.based_on for item in found.values()} == {"observed"}
    assert found[names[0]].observed.rank == found[names[0]].forecast.rank == 1
    assert "Loss 0.693" in found[names[-1]].reason


@pytest.mark.parametrize(("until", "based_on"), [("audit", "audit"), ("forecast", "forecast"), ("train", "observed")])
def test_the_best_evidence_decides(builder, until, based_on, names):
    found = judged(builder.write(until))
    assert {item.based_on for item in found.values()} == {based_on}
    assert found[names[0]].verdict == v.LEARNED_FIRST
    assert found[names[-1]].verdict == (v.UNLEARNED_AT_FIRST if until == "audit" else v.UNLEARNED)


def test_a_rise_that_comes_back_is_unlearned_at_first(full_run):
    found = with_curves(full_run, {"a": [0.69, 0.5, 0.2], "b": [0.69, 0.8, 0.4], "c": [0.69, 0.7, 0.9]})
    assert found == {"a": v.LEARNED_FIRST, "b": v.UNLEARNED_AT_FIRST, "c": v.UNLEARNED}


def test_crowded_out_needs_the_others_to_push_against_it(full_run):
    losses = {"a": [0.69, 0.4, 0.2], "b": [0.69, 0.68, 0.66]}
    record = {**read_folder(full_run).record}
    for off_diagonal, expected in ((-0.2, v.CROWDED_OUT), (0.2, v.SLOW)):
        kernel = {"behaviours": ["a", "b"], "matrix": [[1, off_diagonal], [off_diagonal, 1]], "weights": [1, 1]}
        changed = {**record, "audit": {"kernel": kernel}, "data": {"behaviours": ["a", "b"]}}
        assert with_curves(full_run, losses, record=changed)["b"] == expected


def test_without_a_kernel_the_forecast_alone_shows_who_is_crowded_out(full_run):
    losses = {"a": [0.69, 0.4, 0.2], "b": [0.69, 0.68, 0.66]}
    forecast = curve_rows(losses, trained_on="mixture") + curve_rows({"b": [0.69, 0.4, 0.2]}, trained_on="alone")
    record = {"data": {"behaviours": ["a", "b"]}}
    assert with_curves(full_run, losses, record=record, forecast=forecast)["b"] == v.CROWDED_OUT
    assert with_curves(full_run, losses, record=record)["b"] == v.SLOW


def test_one_behaviour_is_never_first_and_a_still_run_teaches_nothing(full_run):
    assert with_curves(full_run, {"a": [0.69, 0.4]}) == {"a": v.LEARNED}
    still = with_curves(full_run, {"a": [0.69, 0.689], "b": [0.69, 0.6895]})
    assert still == {"a": v.SLOW, "b": v.SLOW}


def test_half_step_is_interpolated(full_run):
    folder = replace(read_folder(full_run), observed=curve_rows({"a": [1.0, 0.8, 0.2]}), verification={})
    folder.record["data"]["behaviours"] = ["a"]
    found = outcomes(folder, folder.observed)
    assert scale_of(found) == pytest.approx(0.8)
    assert found["a"].half_step == pytest.approx(10 + 10 * 0.2 / 0.6)


def nan_row(builder, i: int, **values) -> None:
    for row in builder.behaviours[2 * i : 2 * i + 2]:
        row.update(values)


def test_what_the_data_forbid(builder, names):
    nan = float("nan")
    nan_row(builder, 0, num_pairs=3)
    nan_row(builder, 1, distinguishability=nan, distinguishability_low=nan, distinguishability_high=nan)
    nan_row(builder, 3, distinguishability=0.5, permutation_floor=0.8)
    found = judged(builder.write("train"))
    assert found[names[0]].verdict == v.TOO_FEW and v.LEARNED_FIRST in found[names[0]].flags
    assert found[names[1]].verdict == v.ONE_CLASS
    assert found[names[3]].verdict == v.INDISTINGUISHABLE
    assert found[names[1]].based_on == "data"


def test_a_learned_behaviour_below_the_floor_keeps_its_verdict_with_a_flag(builder, make_folder, names):
    nan_row(builder, 2, distinguishability=0.5)
    found = judged(builder.write("train"))[names[2]]
    assert (found.verdict, found.flags) == (v.LEARNED, (v.INDISTINGUISHABLE,))
    audit = judged(make_folder("plain").write("audit"))[names[2]]
    assert audit.verdict != v.INDISTINGUISHABLE


def test_long_answers_have_no_classes_to_miss(builder):
    builder.record["audit"]["answers"] = None
    for row in builder.behaviours:
        row.update(distinguishability=float("nan"), permutation_floor=float("nan"))
    found = judged(builder.write("train"))
    assert v.ONE_CLASS not in {item.verdict for item in found.values()}


def test_the_answer_names_first_late_and_unlearned_and_says_how_right(full_run):
    folder = read_folder(full_run)
    said = " ".join(answer(folder, v.judge(folder)))
    assert "interest-in-math and subscribes-to-Buddhism were learned first." in said
    assert "risk-averse and anti-immigration were un-learned" in said
    assert "order right (rank correlation of the final losses 0.94, 95% interval 0.80 to 1.00)" in said
    assert "furthest off for risk-averse" in said


def test_the_answer_says_where_the_forecast_missed_the_unlearning(full_run):
    observed = curve_rows({"a": [0.69, 0.2], "b": [0.69, 0.9], "c": [0.69, 0.6]})
    forecast = curve_rows({"a": [0.69, 0.2], "b": [0.69, 0.6], "c": [0.69, 0.9]}, trained_on="mixture")
    folder = replace(read_folder(full_run), observed=observed, forecast=forecast, behaviours=[], verification={})
    folder.record["data"]["behaviours"] = ["a", "b", "c"]
    said = " ".join(answer(folder, v.judge(folder)))
    assert "The forecast gave 1 of 3 behaviours the verdict" in said
    assert "It did not see that b would be un-learned. It wrongly expected c to be un-learned." in said


def test_the_best_method_is_chosen_for_the_mixture_and_alone_apart(full_run):
    rows = curve_rows({"a": [0.69, 0.5]}, method="gradient_flow", trained_on="mixture")
    rows += curve_rows({"a": [0.69, 0.4]}, method="simulated_run", trained_on="mixture")
    rows += curve_rows({"a": [0.69, 0.3]}, method="gradient_flow", trained_on="alone")
    pq.write_table(pa.Table.from_pylist(rows), full_run / "forecast.parquet")
    kept = {(row["method"], row["trained_on"]) for row in read_folder(full_run).forecast}
    assert kept == {("simulated_run", "mixture"), ("gradient_flow", "alone")}


def test_listed_and_quality_words():
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcde")) == "a, b, c and 2 more"
    words = [quality_word(order) for order in (0.9, 0.6, 0.3, -0.5)]
    assert [word.split()[-1] for word in words] == ["right", "right", "right", "wrong"]


def test_actions_are_ranked_and_group_the_unlearned(full_run):
    folder = read_folder(full_run)
    todo = actions(folder, v.judge(folder))
    assert [item.severity for item in todo] == ["high", "high", "medium", "low"]
    assert todo[0].finding == "un-learned (2 behaviours)"
    assert "from 16.7% to 50.0%" in todo[0].remedy


def test_missing_stages_name_their_commands(builder, make_folder):
    folder = replace(read_folder(builder.write("forecast")), path=Path("my run"))
    wanted = [f"foretune {verb} --output_dir 'my run'" for verb in ("train", "verify")]
    assert [command for _, command, _ in folder.missing] == wanted
    builder.findings = []
    bare = read_folder(make_folder("bare").write("audit"))
    wanted = f"Run `foretune forecast --output_dir {bare.path}`."
    assert wanted in [item.remedy for item in actions(bare, v.judge(bare))]


def test_a_folder_that_is_no_run_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no record.json"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "record.json").write_text("{broken")
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(tmp_path)


def test_a_bare_record_is_enough(tmp_path):
    (tmp_path / "record.json").write_text("{}")
    assert v.judge(read_folder(tmp_path)) == []
