"""The bundled data keep what their card promises."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

import foretune.data
from foretune.data import load_preferences, split_answers
from foretune.errors import UserError

BUNDLED = Path(foretune.data.__file__).parent / "bundled"
STATEMENTS = sorted((BUNDLED / "statements").glob("*.jsonl"))
FREE_TEXT = sorted((BUNDLED / "free_text").glob("*.jsonl"))
RANKINGS = sorted((BUNDLED / "rankings").glob("*.jsonl"))


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def num_words(text):
    return len(text.split())


def plain(text):
    return re.sub(r"\W+", " ", text.lower()).strip()


def test_the_card_names_each_behaviour_and_the_sizes():
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    assert (len(STATEMENTS), len(FREE_TEXT), len(RANKINGS)) == (16, 4, 4)
    for path in STATEMENTS + FREE_TEXT + RANKINGS:
        assert f"| {path.stem} |" in card
    for promise in ("16 behaviours,\n1,600 rows", "4 behaviours, 240 rows", "100 rows of 4 responses", "Apache-2.0"):
        assert promise in card


@pytest.mark.parametrize("path", STATEMENTS, ids=lambda path: path.stem)
def test_statements_are_balanced(path):
    rows = read(path)
    answers = [(row["answer_matching_behavior"], row["answer_not_matching_behavior"]) for row in rows]
    assert Counter(answers) == {(" Yes", " No"): 50, (" No", " Yes"): 50}
    for row in rows:
        assert 4 <= num_words(row["statement"]) <= 35
        assert row["statement"] == row["statement"].strip()
        assert '"' not in row["statement"]


def test_no_statement_occurs_twice():
    statements = [plain(row["statement"]) for path in STATEMENTS for row in read(path)]
    assert len(statements) == len(set(statements)) == 1600


@pytest.mark.parametrize("path", FREE_TEXT, ids=lambda path: path.stem)
def test_free_text(path):
    rows = read(path)
    assert len(rows) == len({plain(row["prompt"]) for row in rows}) == 60
    assert len({plain(row[name]) for row in rows for name in ("chosen", "rejected")}) == 120
    for row in rows:
        assert row["prompt"] == row["prompt"].strip() + "\n"
        assert all(row[name] == row[name].strip() for name in ("chosen", "rejected"))
    means = [sum(num_words(row[name]) for row in rows) / 60 for name in ("chosen", "rejected")]
    if path.stem == "brief-answers":
        assert means[0] < 10 < 40 < means[1]
    else:
        assert abs(means[0] - means[1]) < 2


@pytest.mark.parametrize("path", RANKINGS, ids=lambda path: path.stem)
def test_rankings(path):
    rows = read(path)
    assert len(rows) == len({plain(row["prompt"]) for row in rows}) == 25
    tied = path.stem == "keeps-to-the-point"
    for row in rows:
        assert row["prompt"] == row["prompt"].strip() + "\n"
        assert len({plain(text) for text in row["responses"]}) == 4
        assert sorted(row["ranks"]) == ([1, 2, 3, 3] if tied else [1, 2, 3, 4])
    assert len({tuple(row["ranks"]) for row in rows}) > 5  # the order gives nothing away


def test_bundled_data_load():
    statements, free_text = load_preferences("bundled:statements"), load_preferences("bundled:free_text")
    assert (len(statements.train), len(statements.test)) == (1280, 320)
    assert (len(free_text.train), len(free_text.test)) == (192, 48)
    assert split_answers(statements.train) == (" Yes", " No")
    assert split_answers(free_text.train) is None
    rankings = load_preferences("bundled:rankings")
    assert rankings.test is not None and (len(rankings.train), len(rankings.test)) == (3 * 80, 3 * 20)
    assert rankings.info.notes == []
    assert statements.info.notes == free_text.info.notes == []
    with pytest.raises(UserError, match="the bundled ones are bundled:free_text, bundled:rankings, bundled:statements"):
        load_preferences("bundled:other")
