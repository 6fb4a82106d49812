"""The run folder: what is written is read back, and every file is complete or absent."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from foretune.errors import UserError
from foretune.records import RunFolder, load_run, run_folder
from foretune.records.provenance import pairs_hash, sha256_of, versions
from foretune.records.schema import SCHEMA_VERSION, TABLES


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    def fill():
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)

    return fill


WRITES = {
    "json": lambda run, value: run.write_json("file.json", {"value": value}),
    "table": lambda run, value: run.write_table("findings", [{"finding": f"f{value}"}]),
    "yaml": lambda run, value: run.write_yaml("file.yaml", {"value": value}),
    "arrays": lambda run, value: run.write_arrays("file", value=np.full(3, value)),
    "record": lambda run, value: run.update_record(data={"value": value}),
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())


def test_nothing_is_touched_before_the_first_write(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.record == {"schema_version": SCHEMA_VERSION, "stages": {}}
    assert run.read_json("a.json") is run.read_table("pairs") is run.read_yaml("a.yaml") is run.read_arrays("a") is None
    assert run.stage_key("audit") is None
    assert not run.path.exists()


def test_json_and_yaml_come_back_as_they_went(tmp_path):
    run, content = RunFolder(tmp_path / "deep" / "run"), {"é": [1, 2.5, None, True, "x"], "nested": {"a": "ß\n"}}
    run.write_json("a.json", content)
    run.write_yaml("a.yaml", content)
    assert run.read_json("a.json") == run.read_yaml("a.yaml") == content
    assert "é" in (run.path / "a.json").read_text("utf-8")
    assert names(run.path) == ["a.json", "a.yaml"]


def test_values_that_json_has_not_become_null(tmp_path):
    run = RunFolder(tmp_path)
    content = {"a": float("nan"), "b": [float("inf"), -1.0], "c": np.float32("nan"), "d": np.array([1.0, np.nan])}
    run.write_json("a.json", content | {5: (np.int64(3), np.bool_(True))})
    assert run.read_json("a.json") == {"a": None, "b": [None, -1.0], "c": None, "d": [1.0, None], "5": [3, True]}
    text = (tmp_path / "a.json").read_text("utf-8")
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_arrays_come_back_with_shape_and_dtype(tmp_path):
    run = RunFolder(tmp_path)
    arrays = {"pair_id": np.array([2**62, 3]), "margins": np.array([[0.1, np.nan]], dtype=np.float32)}
    run.write_arrays("margins", **arrays)
    found = run.read_arrays("margins")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_their_schema_even_without_rows(tmp_path, name):
    run = RunFolder(tmp_path)
    run.write_table(name, [])
    assert run.read_table(name).schema.equals(TABLES[name])
    assert run.read_table(name).num_rows == 0


def test_tables_keep_values_nan_and_missing_cells(tmp_path):
    run = RunFolder(tmp_path)
    rows = [
        {"pair_id": 2**62, "behaviour": "ä", "truncated": True, "alignment": float("nan")},
        {"pair_id": 1, "weight": 0.1},
    ]
    run.write_table("pairs", iter(rows))
    first, second = run.read_table("pairs").to_pylist()
    assert (first["pair_id"], first["behaviour"], first["truncated"]) == (2**62, "ä", True)
    assert np.isnan(first["alignment"]) and first["weight"] is None
    assert (second["weight"], second["behaviour"]) == (0.1, None)
    assert pq.read_table(tmp_path / "pairs.parquet").num_rows == 2


@every_write
def test_a_full_disk_is_told_to_the_user_and_leaves_the_old_file(tmp_path, full_disk, write):
    run = RunFolder(tmp_path)
    write(run, 1)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    full_disk()
    with pytest.raises(UserError, match="No space left on device.*free some space or choose another --output_dir"):
        write(run, 2)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_write_that_breaks_off_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.write_json("a.json", {"value": 1})

    def half(path, text, encoding):
        path.write_bytes(text.encode(encoding)[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(UserError, match="cannot write"):
        run.write_json("a.json", {"value": 2})
    monkeypatch.undo()
    assert names(tmp_path) == ["a.json"]
    assert run.read_json("a.json") == {"value": 1}


def test_a_folder_that_cannot_be_made_is_told_to_the_user(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        RunFolder(tmp_path / "file" / "run").write_json("a.json", {})


def test_stages_and_sections_of_the_record_are_replaced_one_by_one(tmp_path):
    run = RunFolder(tmp_path)
    run.finish_stage("audit", key="k1", seconds=1.5, data={"pairs": 3})
    run.finish_stage("forecast", key="k2", seconds=float("nan"))
    run.finish_stage("audit", key="k3", seconds=2.0, data={"rows": 4})
    record = load_run(tmp_path).record
    assert record["data"] == {"rows": 4}
    assert {stage: entry["key"] for stage, entry in record["stages"].items()} == {"audit": "k3", "forecast": "k2"}
    assert record["stages"]["forecast"]["seconds"] is None
    assert (run.stage_key("audit"), run.stage_key("train")) == ("k3", None)
    assert record["schema_version"] == SCHEMA_VERSION


def test_only_a_run_folder_of_this_version_is_loaded(tmp_path):
    with pytest.raises(UserError, match="no record.json"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="no record.json"):
        load_run(tmp_path / "nowhere")
    for version in (SCHEMA_VERSION + 1, None):
        (tmp_path / "record.json").write_text(json.dumps({"schema_version": version, "stages": {}}))
        with pytest.raises(UserError, match=f"record version {version}, this foretune reads {SCHEMA_VERSION}"):
            load_run(tmp_path)


def test_a_damaged_record_is_told_to_the_user(tmp_path):
    (tmp_path / "record.json").write_text('{"schema_ver')
    with pytest.raises(UserError, match="not valid JSON.*remove it"):
        load_run(tmp_path)


def test_hashes_depend_on_content_and_order_alone():
    assert sha256_of({"a": 1, "b": [2]}) == sha256_of({"b": [2], "a": 1}) != sha256_of({"a": 1, "b": [3]})
    pairs = [("a", [1, 2]), ("b", [3])]
    assert pairs_hash(iter(pairs)) == pairs_hash(pairs) != pairs_hash(pairs[::-1])
    assert pairs_hash([("a", [1, 2, 3])]) != pairs_hash([("a", [1, 2]), ("", [3])])


def test_versions_name_what_the_numbers_depend_on():
    found = versions()
    assert found["numpy"] == np.__version__
    assert {"python", "torch", "transformers", "trl", "foretune"} <= set(found)


def test_a_long_table_is_written_in_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "ROWS_AT_ONCE", 4)
    run = RunFolder(tmp_path)
    run.write_table("findings", ({"finding": f"f{index}", "num_pairs": index} for index in range(10)))
    file = pq.ParquetFile(tmp_path / "findings.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [4, 4, 2]
    assert run.read_table("findings", ["num_pairs"]).to_pydict() == {"num_pairs": list(range(10))}


@pytest.fixture
def forecast_run(tmp_path):
    run = RunFolder(tmp_path)
    run.write_table("forecast", [{"behaviour": "b", "step": 0}])
    run.write_arrays("forecast_pairs", steps=np.arange(3), margins=np.ones((3, 4)))
    run.write_yaml("config.yaml", {"beta": 0.1})
    run.finish_stage("forecast", key="k", seconds=0.0)
    return run


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"cut": cut, "empty": lambda path: path.write_bytes(b""), "missing": Path.unlink}
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


@every_damage
@pytest.mark.parametrize("name", ["forecast.parquet", "forecast_pairs.npz"])
def test_a_stage_whose_files_do_not_open_is_not_finished(forecast_run, name, damage):
    assert forecast_run.is_finished("forecast", "k", "config.yaml")
    assert not forecast_run.is_finished("forecast", "other settings")
    assert not forecast_run.is_finished("audit", "k")
    damage(forecast_run.path / name)
    assert not forecast_run.is_finished("forecast", "k")


@every_damage
def test_further_files_can_be_asked_for(forecast_run, damage):
    damage(forecast_run.path / "config.yaml")
    assert forecast_run.is_finished("forecast", "k")
    if damage is not cut:  # half of it may be valid
        assert not forecast_run.is_finished("forecast", "k", "config.yaml")


@pytest.mark.parametrize("damage", [cut, DAMAGES["empty"]])
def test_a_damaged_file_is_told_with_the_verb_that_writes_it_again(forecast_run, damage):
    for name, read in (("forecast.parquet", forecast_run.read_table), ("forecast_pairs.npz", forecast_run.read_arrays)):
        damage(forecast_run.path / name)
        with pytest.raises(UserError, match=f"{name} cannot be read .*remove it and run `foretune forecast --output"):
            read(name.partition(".")[0])
    forecast_run.update_record(forecast={"twin": "score"})
    with pytest.raises(UserError, match="run `foretune reward --output_dir"):
        forecast_run.read_table("forecast", ["behaviour"])


def test_a_file_that_a_stage_must_have_left_is_missed_by_name(forecast_run):
    assert forecast_run.need_table("forecast", ["step"]).column_names == ["step"]
    assert set(forecast_run.need_arrays("forecast_pairs")) == {"steps", "margins"}
    with pytest.raises(UserError, match=r"pairs.parquet is missing: run `foretune audit --output_dir .* again"):
        forecast_run.need_table("pairs")
    with pytest.raises(UserError, match="observed_pairs.npz is missing: run `foretune train"):
        forecast_run.need_arrays("observed_pairs")


@pytest.mark.parametrize("content", [b"a: [1", b"- a", b"", b"\xff\xfe"])
def test_settings_that_are_none_are_told(forecast_run, content):
    (forecast_run.path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match="config.yaml cannot be read .*all its arguments"):
        forecast_run.read_yaml("config.yaml")


@pytest.mark.parametrize("content", ["[1]", '{"stages": 3}'])
def test_a_record_that_is_none_is_told(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match="no record of a run"):
        load_run(tmp_path)
