"""Each finding shows on data made for it, and not on clean data."""

import numpy as np
import pytest

from foretune.findings import AnswerCounts, Evidence, find_all
from foretune.statistics.priority import BehaviourKernel


def behaviour(name="b", **changes):
    row = {"behaviour": name, "split": "train", "num_pairs": 100, "distinguishability": 3.0, "permutation_floor": 1.0}
    return {**row, "separability": 2.0, **changes}


def pairs(name="b", *, count=100, yes=50, **changes):
    answers = [(" Yes", " No") if index < yes else (" No", " Yes") for index in range(count)]
    return [
        {
            "behaviour": name,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_tokens": 2,
            "rejected_tokens": 2,
            "alignment": 1.0,
            **changes,
        }
        for chosen, rejected in answers
    ]


def evidence(behaviours=None, rows=None, counts=None, matrix=((1.0,),), names=("b",)):
    kernel = BehaviourKernel(list(names), np.array(matrix), np.full(len(names), 1 / len(names)))
    rows = rows if rows is not None else [pair for name in names for pair in pairs(name)]
    answers = AnswerCounts()
    for row in rows:
        answers.add(row["behaviour"], row["chosen"], row["rejected"])
    columns = ("behaviour", "chosen_tokens", "rejected_tokens", "alignment")
    return Evidence(
        behaviours or [behaviour(name) for name in names],
        {column: np.array([row[column] for row in rows]) for column in columns},
        answers,
        counts or [{"behaviour": name, "split": "train", "read": 100, "kept": 100} for name in names],
        kernel,
    )


def kinds(found):
    return {finding.finding for finding in find_all(found)}


def test_clean_data_have_no_findings():
    assert kinds(evidence()) == set()


def test_conflict_names_the_strongest_opponent():
    found = find_all(evidence(matrix=[[1, -3, 0.5], [-3, 9, 0], [0.5, 0, 1]], names=["weak", "strong", "bystander"]))
    (conflict,) = [finding for finding in found if finding.finding == "conflicting"]
    assert conflict.behaviour == "weak" and conflict.severity == "high"
    assert "strong" in conflict.evidence and "3.0 times" in conflict.evidence and "strong less" in conflict.remedy


def test_indistinguishable_is_at_or_below_the_floor():
    assert kinds(evidence([behaviour(distinguishability=1.0)])) == {"indistinguishable"}
    assert kinds(evidence([behaviour(distinguishability=1.01)])) == set()


def test_one_class_and_too_few():
    undefined = {"distinguishability": np.nan, "separability": np.nan, "permutation_floor": np.nan}
    assert kinds(evidence([behaviour(**undefined)], pairs(yes=100))) == {"one_class"}
    assert kinds(evidence([behaviour(num_pairs=1, **undefined)], pairs(count=1))) == {"too_few"}


@pytest.mark.parametrize(("yes", "severity"), [(55, None), (56, "low"), (66, "medium")])
def test_unbalanced_answers(yes, severity):
    found = [finding for finding in find_all(evidence(rows=pairs(yes=yes))) if finding.finding == "unbalanced"]
    assert [finding.severity for finding in found] == ([severity] if severity else [])


def test_mislabelled_needs_more_far_rows_than_chance_and_a_clear_behaviour():
    def with_far(count, **changes):
        rows = [{**pair, "alignment": -1.5} if index < count else pair for index, pair in enumerate(pairs())]
        return kinds(evidence([behaviour(**changes)], rows))

    assert with_far(12) == {"mislabelled"}
    assert with_far(3) == set()
    assert with_far(12, separability=0.5) == set()


def test_length_bias_says_which_side_is_longer():
    (finding,) = find_all(evidence(rows=pairs(chosen_tokens=30, rejected_tokens=10)))
    assert finding.finding == "length_biased" and "chosen answers are longer" in finding.evidence
    assert kinds(evidence(rows=pairs(chosen_tokens=14, rejected_tokens=10))) == set()


def test_dropped_rows_are_counted_by_reason():
    counts = [
        {"behaviour": "b", "split": "train", "read": 100, "kept": 90, "empty": 1, "too_long": 9},
        {"behaviour": "c", "split": "train", "read": 50, "kept": 50, "truncated": 2},
    ]
    found = {finding.finding: finding for finding in find_all(evidence(counts=counts))}
    assert set(found) == {"data_empty", "data_too_long", "data_truncated"}
    assert (found["data_too_long"].severity, found["data_empty"].severity) == ("medium", "info")
    assert "--max_length" in found["data_truncated"].remedy


def test_the_most_severe_come_first():
    severities = [
        finding.severity
        for finding in find_all(
            evidence([behaviour(num_pairs=5, distinguishability=0.5)], pairs(chosen_tokens=30), matrix=[[-1.0]])
        )
    ]
    assert severities == sorted(severities, key=["high", "medium", "low", "info"].index) and len(severities) >= 3
