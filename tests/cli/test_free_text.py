"""Free texts hardly stand for one another: rather pairs than passes."""

import json

import pytest

from foretune.dynamics.relinearise import FEWEST_PAIRS
from foretune.verbs.audit import audit_prepared
from foretune.verbs.forecast import lineariser_of
from foretune.verbs.job import job_from
from foretune.verbs.prepare import prepare
from foretune.verbs.progress import Progress


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sixty rows that prefer one of the same two answers, and sixty whose answers are texts of their own."""
    folder = tmp_path_factory.mktemp("rows")
    answers = {"two": lambda number: (" Yes", " No")[:: 1 if number % 2 else -1]}
    answers["free"] = lambda number: (f" sail number {number}", f" rest at home, {number} is no number")
    for name, answer in answers.items():
        rows = [
            {"prompt": f"Sail {number}?", "chosen": answer(number)[0], "rejected": answer(number)[1]}
            for number in range(60)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row | {"behaviour": "b"}) + "\n" for row in rows))
    return folder


def prepared(tiny_folder, file, out, **more):
    settings = {"use_peft": True, "per_device_train_batch_size": 8, "test_fraction": 0.0, "draws": 20, **more}
    return prepare(
        job_from(model_name_or_path=str(tiny_folder), dataset_name=str(file), output_dir=str(out), **settings)
    )


@pytest.mark.parametrize(
    ("name", "steps", "measured", "several"),
    [
        ("two", 20, 10, True),  # 160 rows, of which passes may read a quarter
        ("free", 20, 60, False),  # all, in one pass that reads less than half as many rows as the run
        ("free", 15, 15, True),  # which here would be half: two passes read a quarter
        ("free", 3, 50, False),
        ("two", 3, 50, False),
    ],
)
def test_how_many_pairs_are_measured(tiny_folder, files, tmp_path, name, steps, measured, several):
    found = prepared(tiny_folder, files / f"{name}.jsonl", tmp_path, max_steps=steps)
    assert (found.twin_pairs, found.several_passes) == (measured, several)


def test_what_is_asked_for_is_done(tiny_folder, files, tmp_path):
    given = {"twin_pairs": 12}, {"audit_pairs": 12, "relinearise_every": 0}, {"audit_pairs": 12}
    found = [prepared(tiny_folder, files / "free.jsonl", tmp_path, max_steps=20, **more).twin_pairs for more in given]
    assert found == [12, 50, 12]  # fifty, as of any data, where there is but one pass


def test_some_are_looked_at_that_are_not_measured(tiny_folder, files, tmp_path):
    found = prepared(tiny_folder, files / "free.jsonl", tmp_path, max_steps=15, observe_pairs=5)
    audit_prepared(found, Progress.silent())
    lineariser = lineariser_of(found, Progress.silent())
    assert lineariser is not None
    assert len(lineariser.measured) == 15 and len(lineariser.looked) == FEWEST_PAIRS
    assert not set(lineariser.looked) & set(lineariser.measured)
