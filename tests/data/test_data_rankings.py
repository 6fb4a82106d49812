"""Rankings: every layout gives the same contrasts, and what cannot be ranked is dropped with its reason."""

import json
from itertools import combinations

import pytest

from foretune.data import load_preferences
from foretune.errors import UserError

RESPONSES = ["worst", "best", "middle"]
ORDERED = [("best", 1, "worst", 3), ("middle", 2, "worst", 3)]


def load(write_rows, rows, **options):
    return load_preferences(str(write_rows(rows)), **{"test_fraction": 0, **options})


def contrasts(table):
    return [(row["chosen"], row["chosen_rank"], row["rejected"], row["rejected_rank"]) for row in table]


@pytest.mark.parametrize(
    "order",
    [
        {"responses": RESPONSES, "ranks": [3, 1, 2]},
        {"responses": RESPONSES, "ranks": [9, 0.5, 2]},
        {"responses": RESPONSES, "scores": [-1.5, 8, 2]},
        {"responses": RESPONSES, "preferences": [[1, 2], [2, 0]]},
        {"responses": ["best", "middle", "worst"], "ranking": True},
        {"responses": ["best", "middle", "worst"]},
        {"completions": [{"response": t, "overall_score": s} for t, s in zip(RESPONSES, (1, 9.5, 4), strict=True)]},
    ],
    ids=str,
)
def test_layouts_of_one_ranking(write_rows, order):
    data = load(write_rows, [{"prompt": "p", **order}])
    assert data.info.format == "ranking"
    assert contrasts(data.train) == ORDERED
    assert len(set(data.train["ranking"])) == 1 and len(set(data.train["pair_id"])) == 2


def test_ultrafeedback_and_sharegpt_prompts(write_rows):
    assert load(write_rows, [{"instruction": "p", "responses": RESPONSES}]).train["prompt"] == ["p", "p"]
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "p"}]
    row = {"conversations": turns, "responses": [{"from": "gpt", "value": t} for t in RESPONSES], "ranking": True}
    found = load(write_rows, [row]).train[0]
    assert found["prompt"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    assert found["chosen"] == [{"role": "assistant", "content": "worst"}]
    assert load(write_rows, [{"conversations": turns, "responses": RESPONSES}]).train[0]["chosen"] == found["chosen"]


def test_sharegpt_pairs_are_pairs(write_rows):
    turns = [{"from": "human", "value": "p"}]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    data = load(write_rows, [row])
    assert data.info.format == "sharegpt" and "ranking" not in data.train.column_names
    assert data.train[0]["prompt"] == [{"role": "user", "content": "p"}]
    assert [data.train[0][side][0]["content"] for side in ("chosen", "rejected")] == ["a", "b"]
    assert data.train[0]["chosen"][0]["role"] == "assistant"


def test_ties_and_partial_orders(write_rows):
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]},
        {"prompt": "q", "responses": ["a", "b", "c", "d"], "preferences": [[0, 2], [3, 0], [1, 2], [3, 2]]},
    ]
    found = contrasts(load(write_rows, rows).train)
    assert found[:2] == [("a", 1, "c", 2), ("b", 2, "c", 2)]
    assert found[2:] == [("b", 1, "c", 3), ("d", 1, "c", 3), ("a", 2, "c", 3)]


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        ({"responses": ["a"]}, "malformed", "needs a list of at least 2"),
        ({"responses": "a"}, "malformed", "is str, not a list"),
        ({"responses": ["a", "b"], "ranks": [1, 1]}, "malformed", "all 2 responses are tied"),
        ({"responses": ["a", "b"], "ranks": [1]}, "malformed", "ranks has 1 entries for 2 responses"),
        ({"responses": ["a", "b"], "ranks": [1, None]}, "malformed", "None, which is no number"),
        ({"responses": ["a", "b", "c"], "preferences": [[0, 1], [1, 2], [2, 0]]}, "malformed", "form a cycle"),
        ({"responses": ["a", "b"], "preferences": [[0, 2]]}, "malformed", "no list of [better, worse]"),
        ({"responses": ["a", "b"], "ranks": [1, 2], "scores": [1, 2]}, "malformed", "ranks and scores are given"),
        ({"responses": ["a", "b"], "ranking": False}, "malformed", "nothing orders"),
        ({"responses": ["a", " "]}, "empty", None),
        ({"responses": ["a", "a"]}, "identical", None),
        ({"responses": None}, "empty", None),
    ],
    ids=str,
)
def test_faults_are_counted_and_told(write_rows, fault, kind, told):
    good = {"prompt": "p", "responses": ["x", "y"]}
    if "ranks" in fault:
        good["ranks"] = [1, 2]
    if "preferences" in fault:
        good["preferences"] = [[0, 1]]
    data = load(write_rows, [good, {"prompt": "q", **fault}])
    assert data.info.counts[0][kind] == 1 and len(data.train) == 1
    assert told is None or any(told in note for note in data.info.notes)
    with pytest.raises(UserError, match="no training rows are left of 1 rows read"):
        load(write_rows, [{"prompt": "q", **fault}])


def test_a_row_without_ranks_among_ranked_ones_is_dropped(write_rows):
    rows = [{"prompt": "p", "responses": RESPONSES, "ranks": [3, 1, 2]}, {"prompt": "q", "responses": RESPONSES}]
    data = load(write_rows, rows)
    assert data.info.counts[0]["empty"] == 1 and contrasts(data.train) == ORDERED


def test_rankings_are_held_out_limited_and_counted_whole(write_rows):
    rows = [
        {"prompt": f"p{n}", "responses": [f"{n}{k}" for k in range(2 + n % 3)], "behaviour": "ab"[n % 2]}
        for n in range(40)
    ]
    data = load(write_rows, rows, test_fraction=0.25, max_pairs_per_behaviour=8)
    for split, table in (("train", data.train), ("test", data.test)):
        assert table is not None
        counted = [row["kept"] for row in data.info.counts if row["split"] == split]
        assert sum(counted) == len(set(table["ranking"])) == (16 if split == "train" else 4)
        for row in table:
            assert sum(other == row["ranking"] for other in table["ranking"]) == int(row["prompt"][1:]) % 3 + 1
    assert data.test is not None and not set(data.train["prompt"]) & set(data.test["prompt"])


def test_human_preferences_among_four_answers(shared_data, write_rows):
    rows = json.loads((shared_data / "finegrained_rlhf" / "dev_feedback.json").read_text())
    couples = list(combinations(range(4), 2))  # 1: the first is better, 2: the second is, 0: neither
    listed = [
        {
            "prompt": row["question"],
            "responses": [row[f"prediction {number}"] for number in range(1, 5)],
            "preferences": [
                list(couple if found == 1 else couple[::-1])
                for couple, found in zip(couples, row["preference"], strict=True)
                if found
            ],
        }
        for row in rows
    ]
    data = load(write_rows, listed)
    (counts,) = data.info.counts
    assert counts["read"] == 500 and counts["kept"] > 440
    assert not any("cycle" in note for note in data.info.notes)
