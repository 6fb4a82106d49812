"""Where data may come from, and what a user is told when it cannot be read."""

import csv
import gzip
import json

import datasets
import pytest

from foretune.data import load_preferences
from foretune.errors import UserError

ROWS = [{"prompt": f"p{number}", "chosen": f"c{number}", "rejected": f"r{number}"} for number in range(10)]
PERSONA = [
    {"statement": f"s{number}", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
    for number in range(10)
]


def as_json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_file(path, kind):
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(as_json_lines(ROWS).encode()))
    else:
        path.write_text("\ufeff" + as_json_lines(ROWS) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, write_rows, kind):
    path = tmp_path / f"pairs.{kind}"
    write_file(path, kind)
    data = load_preferences(str(path))
    expected = load_preferences(str(write_rows(ROWS, "other.jsonl")))
    assert data.train.to_list() == expected.train.to_list()
    assert data.test.to_list() == expected.test.to_list()
    assert (len(data.train), len(data.test)) == (8, 2)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/anything.jsonl", "test/anything.jsonl"),
        ("pairs_train.jsonl", "pairs_test.jsonl"),
        ("training.jsonl", "eval.jsonl"),
        ("train/our_training_pairs.jsonl", "test/our_test_pairs.jsonl"),
    ],
)
def test_folders_with_splits(tmp_path, write_rows, train, test):
    write_rows(ROWS[:7], train)
    write_rows(ROWS[7:], test)
    (tmp_path / "README.md").write_text("no data")
    data = load_preferences(str(tmp_path))
    assert data.info.behaviours == ["everything"]
    assert data.train["prompt"][:] == [row["prompt"] for row in ROWS[:7]]
    assert data.test["prompt"][:] == [row["prompt"] for row in ROWS[7:]]


def test_shards_are_joined_and_other_names_left_out(tmp_path, write_rows):
    write_rows(ROWS[:3], "train-00000-of-00002.jsonl")
    write_rows(ROWS[3:6], "train-00001-of-00002.jsonl")
    write_rows(ROWS[6:], "test_infer.jsonl")
    data = load_preferences(str(tmp_path), test_fraction=0)
    assert len(data.train) == 6
    assert data.test is None
    assert data.info.notes[0] == "Files whose names are not those of splits were left out: test_infer.jsonl."


def test_split_names_of_the_user(tmp_path, write_rows):
    write_rows(ROWS[:5], "fit.jsonl")
    write_rows(ROWS[5:], "check.jsonl")
    data = load_preferences(str(tmp_path), train_split="fit", test_split="check")
    assert (len(data.train), len(data.test)) == (5, 5)


def test_missing_train_split_lists_the_splits(tmp_path, write_rows):
    write_rows(ROWS, "test.jsonl")
    write_rows(ROWS, "validation.jsonl")
    with pytest.raises(UserError, match="no split 'train' in .*: found test, validation; pass one with --dataset_tr"):
        load_preferences(str(tmp_path))


def test_missing_test_split_is_made_and_told(tmp_path, write_rows):
    write_rows(ROWS, "train.jsonl")
    write_rows(ROWS, "validation.jsonl")
    data = load_preferences(str(tmp_path))
    assert len(data.test) == 2
    assert any("No split 'test' among train, validation" in note for note in data.info.notes)
    assert load_preferences(str(tmp_path), test_fraction=0).test is None


@pytest.mark.parametrize("rows", [ROWS, PERSONA])
def test_folder_of_files_is_one_behaviour_per_file(tmp_path, write_rows, rows):
    write_rows(rows, "kind.jsonl")
    # Ends with a word for a split, as one of Anthropic's persona files does.
    write_rows(
        [dict(row, **{key: "x" + row[key] for key in list(row)[:1]}) for row in rows], "changed-by-training.jsonl"
    )
    info = load_preferences(str(tmp_path)).info
    assert info.behaviours == ["changed-by-training", "kind"]
    assert info.behaviour_column == "file"


def test_folders_of_splits_with_a_file_per_behaviour(tmp_path, write_rows):
    for split, rows in (("train", PERSONA[:6]), ("test", PERSONA[6:])):
        write_rows(rows, f"{split}/kind.jsonl")
        write_rows([row | {"statement": "x" + row["statement"]} for row in rows], f"{split}/bold.jsonl")
    info = load_preferences(str(tmp_path)).info
    assert [row["kept"] for row in info.counts] == [6, 4, 6, 4]
    assert info.behaviours == ["bold", "kind"]


@pytest.mark.parametrize(
    "names", [("0000", "0001"), ("pairs-00000-of-00002", "pairs-00001-of-00002"), ("part-1", "part-2")]
)
def test_shards_are_not_behaviours(tmp_path, write_rows, names):
    for name, rows in zip(names, (ROWS[:5], ROWS[5:]), strict=True):
        write_rows(rows, f"{name}.jsonl")
    assert load_preferences(str(tmp_path)).info.behaviours == ["everything"]


def test_single_persona_file_is_called_after_itself(write_rows):
    assert load_preferences(str(write_rows(PERSONA, "kind.jsonl"))).info.behaviours == ["kind"]
    assert load_preferences(str(write_rows(PERSONA, "train.jsonl"))).info.behaviours == ["everything"]


def test_saved_data_sets(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(tmp_path / "two"))
    assert len(load_preferences(str(tmp_path / "one")).test) == 2
    data = load_preferences(str(tmp_path / "two"))
    assert len(data.train) == 10
    assert data.test is None
    assert any(note.startswith("1 test rows were dropped") for note in data.info.notes)


def test_hub_data_set_with_class_labels(monkeypatch):
    features = datasets.Features(
        {name: datasets.Value("string") for name in ROWS[0]} | {"topic": datasets.ClassLabel(names=["maths", "art"])}
    )
    table = datasets.Dataset.from_list([row | {"topic": number % 2} for number, row in enumerate(ROWS)], features)
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names: asked.append(names) or datasets.DatasetDict(train=table)
    )
    info = load_preferences("someone/pairs", dataset_config="small").info
    assert asked == [("someone/pairs", "small")]
    assert info.behaviours == ["art", "maths"]
    assert info.source == "someone/pairs (small)"


def test_unknown_hub_name_is_one_sentence(monkeypatch):
    def fail(*names):
        raise ConnectionError("Couldn't reach the Hub.\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        load_preferences("someone/pairs")
    assert str(caught.value) == (
        "cannot load data set 'someone/pairs': Couldn't reach the Hub; "
        "check the name (no such path exists) and network."
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "caf\xe9"}\n', r"a.jsonl is not UTF-8: byte 15 is 0xe9"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a.jsonl, line 3 is not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a.jsonl, line 2 is a JSON array; put one object on each line"),
        ("a.json", b'[\n{"a": 1},\n{"a" 1}]', r"a.json, line 3 is not valid JSON"),
        ("a.json", b"[1]", r"a.json, entry 1 is a JSON number"),
        ("a.csv", b"a,b\n1,2,3\n", r"a.csv, line 2 has more cells than the header"),
        ("a.parquet", b"PAR", r"cannot read .*a.parquet as Parquet"),
        ("a.jsonl.gz", b"no gzip", r"cannot read .*a.jsonl.gz"),
        ("a.jsonl", b"\n", r"a.jsonl has no rows; check the file and the split"),
        ("a.txt", b"text", r"a.txt is no data file; give a .jsonl"),
        ("a.jsonl", b'{"text": "x"}\n', r"found columns text; rename them to prompt, chosen, rejected"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_preferences(str(path))


def test_separators_of_lines_inside_text_do_not_break_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"prompt": "one\u2028two", "chosen": "a", "rejected": "b"}
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert load_preferences(str(path)).train[0]["prompt"] == "one\u2028two"


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder"])
def test_missing_path(name):
    with pytest.raises(UserError, match=r"no file or folder .*missing|no file or folder /no/such/folder"):
        load_preferences(name)


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no data files in folder"):
        load_preferences(str(tmp_path))


def test_files_of_different_formats(tmp_path, write_rows):
    write_rows(ROWS, "a.jsonl")
    write_rows(PERSONA, "b.jsonl")
    with pytest.raises(UserError, match="a.jsonl holds rows of format 'preference' but b.jsonl of format 'persona"):
        load_preferences(str(tmp_path))


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x.jsonl", "x" * 5000, "/" + "x/" * 3000])
def test_names_that_no_path_can_have(name):
    with pytest.raises(UserError, match="cannot be looked up .* check the path given as --dataset_name"):
        load_preferences(name)
