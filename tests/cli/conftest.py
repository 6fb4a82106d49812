"""Data that several files of tests use; test modules are imported late, so that pytest explains their asserts."""

import json

import pytest


@pytest.fixture(scope="module")
def unequal_file(tmp_path_factory):
    """Pairs whose responses differ in length, two behaviours."""
    from tests.cli.test_objectives import WORDS

    path = tmp_path_factory.mktemp("data") / "unequal.jsonl"
    rows = [
        {
            "prompt": f"What did you think of on day {number}?",
            "chosen": f" {WORDS[number % 5]}",
            "rejected": f" {WORDS[(number * 3 + 1) % 5]} {number}",
            "behaviour": ["gardening", "sailing"][number % 2],
        }
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def rankings_file(tmp_path_factory):
    from tests.training.test_rankings import ranking_rows

    path = tmp_path_factory.mktemp("data") / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ranking_rows(30, lambda number: 2 + number % 3)))
    return path


@pytest.fixture(scope="module")
def unpaired_file(tmp_path_factory):
    from tests.cli.test_unpaired import rows_of, written

    return written(tmp_path_factory.mktemp("data") / "unpaired.jsonl", rows_of())
