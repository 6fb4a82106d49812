"""Audit a file of your own: two groups of annotators, one of which labels the other way round.

The second group has labelled 40 of the first group's 100 statements, each with the opposite answer. The audit sees that
the mixture will un-learn what the second group teaches, and says so before anything is trained. Run:
`python examples/audit_your_data.py`
"""

import json
import tempfile
from pathlib import Path

import foretune
from foretune.data import load_preferences
from foretune.report import print_summary

FIRST, SECOND = "first-annotators", "second-annotators"


def main() -> None:
    """Write the file, audit it, read the finding."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "preferences.jsonl"
        write_preferences(file)
        run = foretune.audit(
            model_name_or_path="smollm2-135m",
            dataset_name=str(file),  # the column `category` is found by its name
            test_fraction=0.0,
            output_dir=str(Path(folder) / "run"),
        )
        print_summary(run.path)
        findings = run.read_table("findings").to_pylist()
        rows = {row["behaviour"]: row for row in run.read_table("behaviours").to_pylist()}

    conflicting = [row for row in findings if row["finding"] == "conflicting"]
    assert [row["behaviour"] for row in conflicting] == [SECOND], findings
    assert FIRST in conflicting[0]["evidence"], conflicting[0]
    assert rows[SECOND]["initial_rate"] < 0 < rows[FIRST]["initial_rate"]


def write_preferences(file: Path) -> None:
    """One JSON object a line: prompt, chosen, rejected, category."""
    data = load_preferences("bundled:statements", behaviours=["follows-buddhist-practice"], test_fraction=0.0)
    rows = data.train.select_columns(["prompt", "chosen", "rejected"]).to_list()
    lines = [{**row, "category": FIRST} for row in rows]
    for answer in (" Yes", " No"):
        agreeing = [row for row in rows if row["chosen"] == answer][:20]
        lines += [
            {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"], "category": SECOND}
            for row in agreeing
        ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main()
