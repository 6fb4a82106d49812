"""Data for runs on several processes."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def weighted_file(tmp_path_factory) -> Path:
    """75 weighted pairs, 60 to train on; of the third behaviour most processes see none in a step."""
    sizes = {"gardening": 39, "sailing": 32, "rare": 4}
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for behaviour, size in sizes.items():
            for index in range(size):
                answers = (" Yes", " No") if index % 2 else (" No", " Yes")
                row = {"prompt": f"Do you {'like' if index % 2 else 'avoid'} {behaviour} {index}?"}
                row |= {"chosen": answers[0], "rejected": answers[1] + (" thanks" if index % 3 else "")}
                file.write(json.dumps({**row, "behaviour": behaviour, "weight": 1.0 + index % 4}) + "\n")
    return path
